"""LoRA fine-tuning as a script, `python -m helpers.finetune`, and the parts that notebooks 05, 11 and 12 show."""
