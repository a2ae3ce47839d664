"""Training objectives. Importing this package registers the pretraining stages in `STAGES`."""

from trainer.stages.crysdiff import CrysDiffConfig, CrysDiffStage
from trainer.stages.crysgnn import CrysGNNConfig, CrysGNNStage
from trainer.stages.crystal_twins import CrystalTwinsConfig, CrystalTwinsStage
from trainer.stages.crysxpp import CrysXPPConfig, CrysXPPStage
from trainer.stages.dpf import DPFConfig, DPFStage
from trainer.stages.finetune import FinetuneConfig, FinetuneStage
from trainer.stages.joint import JointConfig, JointStage
from trainer.stages.vae import VAEConfig, VAEStage

__all__ = [
    "CrysDiffConfig",
    "CrysDiffStage",
    "CrysGNNConfig",
    "CrysGNNStage",
    "CrysXPPConfig",
    "CrysXPPStage",
    "CrystalTwinsConfig",
    "CrystalTwinsStage",
    "DPFConfig",
    "DPFStage",
    "FinetuneConfig",
    "FinetuneStage",
    "JointConfig",
    "JointStage",
    "VAEConfig",
    "VAEStage",
]
