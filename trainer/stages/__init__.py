"""Training objectives. Importing this package registers the pretraining stages in `STAGES`."""

from crysforge.trainer.stages.crysdiff import CrysDiffConfig, CrysDiffStage
from crysforge.trainer.stages.crysgnn import CrysGNNConfig, CrysGNNStage
from crysforge.trainer.stages.crystal_twins import CrystalTwinsConfig, CrystalTwinsStage
from crysforge.trainer.stages.crysxpp import CrysXPPConfig, CrysXPPStage
from crysforge.trainer.stages.dpf import DPFConfig, DPFStage
from crysforge.trainer.stages.finetune import FinetuneConfig, FinetuneStage
from crysforge.trainer.stages.joint import JointConfig, JointStage
from crysforge.trainer.stages.vae import VAEConfig, VAEStage

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
