"""LongLoRA: LoRA alone does not lengthen a text; with norms and embeddings it does.

Paper: Chen et al. 2023, "LongLoRA", https://arxiv.org/abs/2309.12307, Table 2 (7B to 32,768 tokens, shifted sparse
attention, RedPajama, PG19).

    make data-tables                                    what it reads
    python -m experiments.run longlora_trainable        laptop: 15 runs
    python -m experiments.tables                        the table, from the results

laptop   SmolLM2-135M with interpolated positions, on Moby-Dick (`experiments.longlora_runs`, which says what a run is),
         shifted sparse attention in training.  Its head is tied to its embedding, and trains with it; the paper's
         Llama 2 has a head of its own, which rests.

         lora         rank 8 on q, k, v and o
         lora-norm    with the norms whole
         lora-embed   with the embedding whole
         lora-both    with both: LongLoRA
         full         every weight

paper    Llama 2 7B, ranks from 8 to 256: `experiments.longlora_paper`.
"""

from experiments import longlora_paper
from experiments.harness import Part, Profile, Speed, Table
from experiments.longlora_runs import Row, Settings, load, perplexities, places, run

SETTINGS = Settings()
FIGURES = longlora_paper.TRAINABLE
ROWS = tuple(Row(name, name) for name in ("lora", "lora-norm", "lora-embed", "lora-both", "full"))

LAPTOP = Profile(
    parts=(Part("Table 2: what trains", ROWS, {row.name: FIGURES[row.name] for row in ROWS}),),
    settings=SETTINGS,
    metrics=perplexities(SETTINGS),
    speed=Speed(170, 500, "from processor time, on two CPU cores"),
    places=places,
    load=load,
    run=run,
)

TABLE = Table(
    "longlora_trainable",
    "LongLoRA: what trains beside LoRA",
    "Chen et al. 2023, [arXiv 2309.12307](https://arxiv.org/abs/2309.12307), Table 2",
    {"laptop": LAPTOP, "paper": longlora_paper.TRAINABLE_PROFILE},
)
