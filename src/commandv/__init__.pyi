"""The public names, and nothing else."""

from .adapter import (
    Adapter as Adapter,
)
from .adapter import (
    Intervention as Intervention,
)
from .adapter import (
    ablation as ablation,
)
from .adapter import (
    consreft as consreft,
)
from .adapter import (
    direft as direft,
)
from .adapter import (
    lobireft as lobireft,
)
from .adapter import (
    loreft as loreft,
)
from .adapter import (
    nodireft as nodireft,
)
from .adapter import (
    noreft as noreft,
)
from .adapter import (
    steering_vector as steering_vector,
)
from .attaching import attach as attach
from .carried import Carried as Carried
from .convert import (
    Affine as Affine,
)
from .convert import (
    Autoencoder as Autoencoder,
)
from .convert import (
    FactorStore as FactorStore,
)
from .convert import (
    FourierRidge as FourierRidge,
)
from .convert import (
    Pinv as Pinv,
)
from .convert import (
    Procrustes as Procrustes,
)
from .convert import (
    ReducedRank as ReducedRank,
)
from .convert import (
    Ridge as Ridge,
)
from .errors import CommandVError as CommandVError
from .evaluate import Score as Score
from .evaluate import Task as Task
from .evaluate import Trial as Trial
from .evaluate import choose_layer as choose_layer
from .evaluate import drift as drift
from .evaluate import measure as measure
from .evaluate import validate_mapper as validate_mapper
from .finetuning import LoRASettings as LoRASettings
from .finetuning import finetune as finetune
from .finetuning import with_lora as with_lora
from .generation import generate as generate
from .held_out import Fidelity as Fidelity
from .held_out import fidelity as fidelity
from .load import load_adapter as load_adapter
from .match import (
    all_layers as all_layers,
)
from .match import (
    every_other as every_other,
)
from .match import (
    explicit as explicit,
)
from .match import (
    last_half as last_half,
)
from .match import (
    last_third as last_third,
)
from .match import (
    lowest_error as lowest_error,
)
from .match import (
    middle_third as middle_third,
)
from .match import (
    nearest as nearest,
)
from .match import (
    proportional as proportional,
)
from .models import LM as LM
from .models import load_model as load_model
from .models import wrap_model as wrap_model
from .pasting import paste as paste
from .pasting import random_like as random_like
from .positions import Positions as Positions
from .profiles import (
    Profile as Profile,
)
from .profiles import (
    load_profile as load_profile,
)
from .profiles import (
    save_profile as save_profile,
)
from .profiling import profile as profile
from .prompts import PromptSet as PromptSet
from .prompts import load_prompts as load_prompts
from .prompts import mixed_forms as mixed_forms
from .steering import (
    Contrast as Contrast,
)
from .steering import (
    Probe as Probe,
)
from .steering import (
    auc as auc,
)
from .steering import (
    carry_directions as carry_directions,
)
from .steering import (
    carry_probes as carry_probes,
)
from .steering import (
    clamp as clamp,
)
from .steering import (
    directions as directions,
)
from .steering import (
    from_directions as from_directions,
)
from .steering import (
    load_contrast as load_contrast,
)
from .steering import (
    mean_ablation_along as mean_ablation_along,
)
from .steering import (
    probes as probes,
)
from .steering import (
    prompt_states as prompt_states,
)
from .steering import (
    steer as steer,
)
from .store import save as save
from .training import (
    ConsReFT as ConsReFT,
)
from .training import (
    DiReFT as DiReFT,
)
from .training import (
    LobiReFT as LobiReFT,
)
from .training import (
    LoReFT as LoReFT,
)
from .training import (
    NodiReFT as NodiReFT,
)
from .training import (
    NoReFT as NoReFT,
)
from .training import (
    TrainSettings as TrainSettings,
)
from .training import (
    train as train,
)
