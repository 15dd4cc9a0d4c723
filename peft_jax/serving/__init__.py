"""Many adapters served from one base (S-LoRA: Sheng et al. 2023, arXiv 2311.03285): see docs/serving.md."""
