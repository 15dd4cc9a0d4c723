"""LongLoRA: which attention to train with, so that a model reads long texts with full attention afterwards.

Paper: Chen et al. 2023, "LongLoRA", https://arxiv.org/abs/2309.12307, Table 1 (7B, fully fine-tuned on RedPajama, PG19)
and section 4.2 (passkey retrieval).

    make data-tables                                    what it reads
    python -m experiments.run longlora_attention        laptop: 27 runs, 12 of which train
    python -m experiments.tables                        the table, from the results

laptop   SmolLM2-135M with interpolated positions, on Moby-Dick (`experiments.longlora_runs`, which says what a run is).

         base           the model as it is: what is to be recovered
         interpolated   its positions divided by 4, untrained: broken
         full           fine-tuned with full attention
         short          in groups of a quarter of the text, which nothing crosses
         shifted        LongLoRA: half of the heads have their groups shifted by half of one
         wrapped        the same by the paper's algorithm 1, whose last shifted group holds the text's beginning too

         All rows that train have LongLoRA's parts: LoRA of rank 8 on q, k, v and o, embeddings and norms whole.  The
         paper's were trained in full.  80 steps of 256 tokens.

         passkey-base, -interpolated, -shifted   the share of passkeys found, five a seed and length

paper    Llama 2 7B on RedPajama, PG19 and Proof-pile: `experiments.longlora_paper`.
"""

from experiments import longlora_paper
from experiments.harness import Part, Profile, Speed, Table
from experiments.longlora_runs import Row, Settings, found, load, perplexities, places, run

SETTINGS = Settings()
FIGURES = longlora_paper.ATTENTION
ROWS = (
    Row("base", interpolated=False),
    Row("interpolated"),
    *(Row(name, "lora-both", name) for name in ("full", "short", "wrapped", "shifted")),
)
KEYS = (
    Row("passkey-base", interpolated=False, passkeys=True),
    Row("passkey-interpolated", passkeys=True),
    Row("passkey-shifted", "lora-both", "shifted", passkeys=True),
)

LAPTOP = Profile(
    parts=(
        Part(
            "Table 1: attention in training", ROWS, {row: FIGURES[f"7b-{row}"] for row in ("full", "short", "shifted")}
        ),
        Part("Passkey retrieval", KEYS, {}, metrics=found(SETTINGS)),
    ),
    settings=SETTINGS,
    metrics=perplexities(SETTINGS),
    speed=Speed(170, 500, "from processor time, on two CPU cores"),
    places=places,
    load=load,
    run=run,
)

TABLE = Table(
    "longlora_attention",
    "LongLoRA: attention in training",
    "Chen et al. 2023, [arXiv 2309.12307](https://arxiv.org/abs/2309.12307), Table 1",
    {"laptop": LAPTOP, "paper": longlora_paper.ATTENTION_PROFILE},
)
