"""Training objectives. Importing this package registers the pretraining stages in `STAGES`."""

from trainer.stages.finetune import FinetuneConfig, FinetuneStage
from trainer.stages.joint import JointConfig, JointStage
from trainer.stages.vae import VAEConfig, VAEStage

__all__ = [
    "FinetuneConfig",
    "FinetuneStage",
    "JointConfig",
    "JointStage",
    "VAEConfig",
    "VAEStage",
]
