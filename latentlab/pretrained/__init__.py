"""Models: where weights and tokenizers come from, and how they are stored.

Read loading.py first; scratch.py builds small models, coconut.py reads published Coconut
checkpoints, lora.py has LoRA adapters of a base.
"""

from latentlab.pretrained.adapters import merge_adapter as merge_adapter
from latentlab.pretrained.loading import load_model as load_model
from latentlab.pretrained.loading import model_from_config as model_from_config
from latentlab.pretrained.loading import save_model as save_model
from latentlab.pretrained.loading import shipped_checkpoint as shipped_checkpoint
from latentlab.pretrained.scratch import build_model as build_model
