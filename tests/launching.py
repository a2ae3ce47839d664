"""Settings of small pretraining and finetuning jobs."""

PRETRAIN = [
    "--config=pretrain/tiny", "vae.max_steps=3", "joint.max_steps=3",
    "vae.batch_size=16", "joint.batch_size=16", "loader.workers=0", "trainer.log_every=1",
]  # fmt: skip
FINETUNE = [
    "--config=finetune/tiny", "finetune.epochs=2", "loader.workers=0",
    "trainer.log_every=1",
]  # fmt: skip
