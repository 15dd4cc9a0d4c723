"""Many adapters served from one base, whose keys, values and adapters share one pool of rows.

Source: Sheng et al. 2023 (S-LoRA, arXiv 2311.03285).
"""
