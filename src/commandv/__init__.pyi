"""The public names, and nothing else."""

from .adapters.adapter import (
    Adapter as Adapter,
)
from .adapters.adapter import (
    Intervention as Intervention,
)
from .adapters.attach import attach as attach
from .adapters.carried import Carried as Carried
from .adapters.edit import Edit as Edit
from .adapters.kinds import (
    ablation as ablation,
)
from .adapters.kinds import (
    consreft as consreft,
)
from .adapters.kinds import (
    direft as direft,
)
from .adapters.kinds import (
    lobireft as lobireft,
)
from .adapters.kinds import (
    loreft as loreft,
)
from .adapters.kinds import (
    nodireft as nodireft,
)
from .adapters.kinds import (
    noreft as noreft,
)
from .adapters.kinds import (
    steering_vector as steering_vector,
)
from .adapters.network import Network as Network
from .adapters.store import save as save
from .errors import CommandVError as CommandVError
from .evaluation import Score as Score
from .evaluation import Task as Task
from .evaluation import choose_layer as choose_layer
from .evaluation import drift as drift
from .evaluation import measure as measure
from .evaluation.transferring.certificate import Transferred as Transferred
from .evaluation.transferring.job import TransferSettings as TransferSettings
from .evaluation.transferring.running import transfer_adapter as transfer_adapter
from .executors.executor import Local as Local
from .executors.ray import Ray as Ray
from .interop.load import load_adapter as load_adapter
from .interop.share import pull as pull
from .interop.share import push as push
from .models.encoding import encode as encode
from .models.generation import generate as generate
from .models.layers import (
    all_layers as all_layers,
)
from .models.layers import (
    every_other as every_other,
)
from .models.layers import (
    last_half as last_half,
)
from .models.layers import (
    last_third as last_third,
)
from .models.layers import (
    middle_third as middle_third,
)
from .models.live import attached as attached
from .models.live import detach_all as detach_all
from .models.lm import LM as LM
from .models.load import load_model as load_model
from .models.load import wrap_like as wrap_like
from .models.load import wrap_model as wrap_model
from .positions import Positions as Positions
from .profiles.profile import (
    Profile as Profile,
)
from .profiles.profile import (
    load_profile as load_profile,
)
from .profiles.profile import (
    save_profile as save_profile,
)
from .profiles.profiling import profile as profile
from .profiles.profiling import profile_on as profile_on
from .prompts.sets import Prompt as Prompt
from .prompts.sets import PromptSet as PromptSet
from .prompts.sets import load_prompts as load_prompts
from .prompts.sets import mixed_forms as mixed_forms
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
from .training.train import (
    ConsReFT as ConsReFT,
)
from .training.train import (
    DiReFT as DiReFT,
)
from .training.train import (
    LobiReFT as LobiReFT,
)
from .training.train import (
    LoReFT as LoReFT,
)
from .training.train import (
    NodiReFT as NodiReFT,
)
from .training.train import (
    NoReFT as NoReFT,
)
from .training.train import (
    TrainSettings as TrainSettings,
)
from .training.train import (
    train as train,
)
from .transfer.convert import (
    Affine as Affine,
)
from .transfer.convert import (
    AffineMap as AffineMap,
)
from .transfer.convert import (
    Autoencoder as Autoencoder,
)
from .transfer.convert import (
    Dense as Dense,
)
from .transfer.convert import (
    FourierRidge as FourierRidge,
)
from .transfer.convert import (
    Pinv as Pinv,
)
from .transfer.convert import (
    Procrustes as Procrustes,
)
from .transfer.convert import (
    ReducedRank as ReducedRank,
)
from .transfer.convert import (
    Ridge as Ridge,
)
from .transfer.distil.context import Context as Context
from .transfer.distil.demonstrate import demonstrate as demonstrate
from .transfer.distil.demonstrations import (
    Demonstrations as Demonstrations,
)
from .transfer.distil.demonstrations import (
    load_demonstrations as load_demonstrations,
)
from .transfer.distil.demonstrations import (
    save_demonstrations as save_demonstrations,
)
from .transfer.distil.distil import distil as distil
from .transfer.distil.vocabulary import Answers as Answers
from .transfer.distil.vocabulary import Vocabulary as Vocabulary
from .transfer.fidelity import Fidelity as Fidelity
from .transfer.link import Link as Link
from .transfer.link import link as link
from .transfer.match import LayerPair as LayerPair
from .transfer.match import (
    explicit as explicit,
)
from .transfer.match import (
    lowest_error as lowest_error,
)
from .transfer.match import (
    nearest as nearest,
)
from .transfer.match import (
    proportional as proportional,
)
from .transfer.paste import fidelity as fidelity
from .transfer.paste import paste as paste
from .transfer.paste import published as published
from .transfer.paste import random_like as random_like
