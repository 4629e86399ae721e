"""Stage II: composing adapters, PEFT's LoRA in the text tower, which act only while a composed query is encoded.

A model's own adapter is called "default"; further ones, in PEFT's own format, are loaded beside it.
"""

import contextlib
import copy
import os
import re
import shutil
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.utils import cached_file

from .backbone import fingerprint_of_tensors


ADAPTER_NAME = "default"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Ways to begin an adapter that change the weights below it.
REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga")
PEFT_PREFIX = "base_model.model."
# Which adapter acts is state of shared modules, so encoding is serialised among threads.
_SWITCH = threading.RLock()


class AdapterMixin:
    """Several composing adapters in one [`TSCIRModel`]; a base class of it."""

    @property
    def adapter_names(self) -> list[str]:
        """Names of the composing adapters, the model's own first."""
        return list(getattr(self.clip.text_model, "peft_config", {}))

    @property
    def active_adapter(self) -> str | None:
        """The adapter that composed queries use unless a call names another; None where there is none."""
        return self._active if self._active in self.adapter_names else None

    def set_adapter(self, adapter_name: str) -> None:
        """Use this composing adapter from now on. Raises `ValueError` for an unknown name."""
        self._active = self.known_adapter(adapter_name)

    def disable_adapters(self) -> None:
        """Compose without adapters, as stage I does, until `set_adapter` or `enable_adapters`."""
        self._active = None

    def enable_adapters(self) -> None:
        """Use the model's own composing adapter again."""
        self._active = ADAPTER_NAME

    def known_adapter(self, name: str) -> str:
        if name not in self.adapter_names:
            raise ValueError(f"no composing adapter {name!r}; this model has {self.adapter_names or 'none'}")
        return name

    def load_adapter(
        self,
        path: str | os.PathLike,
        adapter_name: str,
        *,
        subfolder: str = "",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> None:
        """Load a composing adapter in PEFT's format beside those that are there; `set_adapter` makes it act.

        Args:
            path (`str`): local folder or Hub repository, as `save_adapter` writes it.
            adapter_name (`str`): letters, digits, "-" and "_".
            subfolder, revision, token, cache_dir, local_files_only, force_download: as
                `PreTrainedModel.from_pretrained` has them.

        Raises:
            ValueError: if it is missing, is no LoRA of this text tower, is not in safetensors, or was trained with
                another backbone or mapper.
        """
        if self.config.stage == 0:
            raise ValueError("this is a plain CLIP without a mapper; composing adapters need one (train/stage1.py)")
        check_name(adapter_name)
        if adapter_name in self.adapter_names:
            raise ValueError(
                f"there is a composing adapter {adapter_name!r} already; name another, or delete it first"
            )
        hub = {"subfolder": subfolder, "revision": revision, "token": token, "cache_dir": cache_dir}
        hub |= {"local_files_only": local_files_only, "force_download": force_download}
        found = {}
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            try:
                found[name] = cached_file(os.fspath(path), name, **hub)
            except OSError as error:
                raise ValueError(
                    f"{path} has no {os.path.join(subfolder, name)} that can be read ({error}); a composing adapter "
                    "is a folder that TSCIRModel.save_adapter or PEFT wrote, with weights in safetensors"
                ) from error
        config = read_lora_config(found[ADAPTER_CONFIG])
        tensors = self._read_adapter(found[ADAPTER_WEIGHTS])
        try_on(self.clip.text_model, config, tensors, found[ADAPTER_WEIGHTS])
        if self.config.stage == 1:
            self.add_adapters()  # an identity, so that the model's own answers stay as they are
        with _SWITCH:
            inject(self.clip.text_model, adapter_name, config)
            set_peft_model_state_dict(self.clip.text_model, tensors, adapter_name=adapter_name)
            for layer in lora_layers(self.clip.text_model):
                layer.train(self.training)
            for path, parameter in self.clip.text_model.named_parameters():  # other parts may lie on a disk
                if of_adapter(path, adapter_name):
                    parameter.data = parameter.data.to(self.dtype)

    def _read_adapter(self, path: str) -> dict[str, torch.Tensor]:
        """An adapter's tensors by their names in the text tower."""
        try:
            with safe_open(path, framework="pt") as file:
                made_for = file.metadata() or {}
                tensors = {name.removeprefix(PEFT_PREFIX): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}); fetch or write it again") from error
        own = self._fingerprints()
        if "mapper_fingerprint_by_fp16" not in made_for and self.dtype == torch.float16:
            own = {k: v for k, v in own.items() if not k.startswith("mapper")}  # nothing was told that it could be
        for part in ("mapper", "backbone"):
            here, there = ({v for k, v in told.items() if k.startswith(part)} for told in (own, made_for))
            if here and there and not here & there:
                raise ValueError(
                    f"{path} was trained with another {part} than this model has (fingerprint "
                    f"{' or '.join(sorted(there))}, here {' or '.join(sorted(here))}); load the model that it was "
                    "trained with"
                )
        return tensors

    def _fingerprints(self) -> dict[str, str]:
        """Of the mapper two, one of which stays whichever half precision it was kept in since, and of the backbone."""
        own, weights = {}, self.mapper.state_dict()
        if not any(v.is_meta for v in weights.values()):  # on a disk, where they are not looked for
            own["mapper_fingerprint"] = fingerprint_of_tensors({k: v.bfloat16() for k, v in weights.items()})
            by_fp16 = {k: v.half().bfloat16() for k, v in weights.items()}
            own["mapper_fingerprint_by_fp16"] = fingerprint_of_tensors(by_fp16)
        if self.config.backbone_fingerprint:
            own["backbone_fingerprint"] = self.config.backbone_fingerprint
        return own

    def save_adapter(self, save_directory: str | os.PathLike, adapter_name: str | None = None) -> None:
        """Write one composing adapter in PEFT's own format: `load_adapter` reads it, and so does
        `peft.PeftModel.from_pretrained(clip.text_model, folder)` without this package.

        Args:
            adapter_name (`str`, *optional*): the active one unless told.
        """
        name = self.known_adapter(adapter_name or self.active_adapter or ADAPTER_NAME)
        folder = Path(save_directory)
        if (folder / "config.json").is_file():
            raise ValueError(f"{folder} holds a model; an adapter needs a folder of its own")
        folder.mkdir(parents=True, exist_ok=True)
        text_model = self.clip.text_model
        config = copy.deepcopy(text_model.peft_config[name])
        config.base_model_name_or_path = self.config.backbone_name_or_path
        config.revision = self.config.backbone_revision
        config.inference_mode = True
        config.save_pretrained(folder)
        tensors = get_peft_model_state_dict(text_model, adapter_name=name, save_embedding_layers=False)
        tensors = {PEFT_PREFIX + k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt", **self._fingerprints()})
        shutil.copymode(folder / "adapter_config.json", folder / ADAPTER_WEIGHTS)  # its owner alone could read it

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget a further composing adapter. Raises `ValueError` for the model's own and unknown ones."""
        if self.known_adapter(adapter_name) == ADAPTER_NAME:
            raise ValueError("the model's own composing adapter stays; disable_adapters() composes without it")
        with _SWITCH:
            for layer in lora_layers(self.clip.text_model):
                layer._active_adapter = [ADAPTER_NAME]
                layer.delete_adapter(adapter_name)
            del self.clip.text_model.peft_config[adapter_name]
            self._merged.pop(adapter_name, None)
            if self._active == adapter_name:
                self._active = ADAPTER_NAME

    def merge_adapter(self, adapter_name: str | None = None) -> None:
        """For serving: keep a copy of the text tower with this adapter (the active one unless told) merged into its
        weights, and compose with that. Queries then cost what plain texts do, and threads need not wait for one
        another. The frozen tower, the adapters and what is saved stay as they are; where no adapter acts and none is
        told, nothing is done.
        """
        if adapter_name is None and self.active_adapter is None:
            return
        name = self.known_adapter(adapter_name or self.active_adapter)
        with _SWITCH:
            tower = copy.deepcopy(self.clip.text_model)
        for path, layer in [(n, m) for n, m in tower.named_modules() if isinstance(m, LoraLayer)]:
            layer.merge(adapter_names=[name])
            parent, _, child = path.rpartition(".")
            setattr(tower.get_submodule(parent), child, layer.get_base_layer())
        del tower.peft_config
        self._merged[name] = tower.eval().requires_grad_(False)

    def train(self, mode: bool = True):
        """As every module's, but the frozen towers never drop anything, whatever a CLIP's configuration says; merged
        copies, which training would leave behind, are dropped."""
        super().train(mode)
        if mode:
            self._merged.clear()
            self.clip.eval()
            for layer in lora_layers(self.clip.text_model):
                layer.train()
        return self

    def load_state_dict(self, *args, **kwargs):
        """As every module's; merged copies, which would keep the weights from before, are dropped."""
        self._merged.clear()
        return super().load_state_dict(*args, **kwargs)

    def _apply(self, fn, recurse: bool = True):
        for tower in self._merged.values():  # they move with the model, but are none of its parameters
            tower._apply(fn, recurse)
        return super()._apply(fn, recurse)


def check_name(name: str) -> str:
    """Raise `ValueError` for an adapter's name that cannot be a folder's and a module's."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise ValueError(f"an adapter's name has letters, digits, - and _ alone, not {name!r}")
    if hasattr(nn.ModuleDict(), name):
        raise ValueError(f"{name!r} cannot be an adapter's name, as torch's modules have it already; take another")
    return name


def read_lora_config(path: str) -> LoraConfig:
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(os.path.dirname(path))
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"{path} is no adapter's configuration: {error!r}") from error
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{path} is of an adapter of type {config.peft_type}; composing adapters are LoRA")
    return config


def add_composing_adapters(text_model: nn.Module, rank: int, alpha: int, dropout: float, targets: list[str]) -> None:
    """Put zero-initialised LoRA layers into `text_model`, switched off until `composing` switches them on.

    Raises `ValueError` for targets that it has not.
    """
    known = {name.rpartition(".")[2] for name, module in text_model.named_modules() if isinstance(module, nn.Linear)}
    if unknown := sorted(set(targets) - known):
        raise ValueError(
            f"no {' or '.join(unknown)} in this text tower for composing adapters; known are {sorted(known)}"
        )
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets))
    inject(text_model, ADAPTER_NAME, config)


def try_on(text_model: nn.Module, config: LoraConfig, tensors: dict[str, torch.Tensor], path: str) -> None:
    """Put an adapter on a text tower without weights. Raises `ValueError` unless it fits and is LoRA alone."""
    kind = config.init_lora_weights
    if isinstance(kind, str) and kind.startswith(REWRITING):
        raise ValueError(
            f"{path}: an adapter begun by {kind!r} belongs to weights that PEFT changed for it, and the tower is "
            "frozen; save it with PEFT's conversion to plain LoRA (path_initial_model_for_weight_conversion)"
        )
    more = [name for name in ("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication",
                              "alora_invocation_tokens") if getattr(config, name, None)]  # fmt: skip
    more += ["bias"] if config.bias != "none" else []
    if more:
        raise ValueError(f"{path} changes more than LoRA does ({', '.join(more)}), and the tower is frozen")
    with torch.device("meta"):
        # In the dtype there is, as another would be torch's default for all threads while it is made.
        trial = type(text_model)._from_config(copy.deepcopy(text_model.config), dtype=torch.get_default_dtype())
    before = {name for name, _ in trial.named_parameters()}
    try:
        # Beside another, as it will be: PEFT does not put all kinds of them together.
        inject(trial, ADAPTER_NAME, LoraConfig(r=1, target_modules=config.target_modules))
        inject(trial, "tried", config)
        wanted = get_peft_model_state_dict(trial, adapter_name="tried", save_embedding_layers=False)
        after = {n.replace(".base_layer.", ".") for n, _ in trial.named_parameters()
                 if not of_adapter(n, "tried") and not of_adapter(n, ADAPTER_NAME)}  # fmt: skip
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{path} does not fit this text tower: {error!r}") from error
    if before != after or not all(isinstance(layer.get_base_layer(), nn.Linear) for layer in lora_layers(trial)):
        raise ValueError(f"{path} changes more of the text tower than LoRA on its linear layers")
    problems = sorted({k for k, v in wanted.items() if k not in tensors or tensors[k].shape != v.shape})
    problems += sorted(tensors.keys() - wanted.keys())
    if problems:
        raise ValueError(
            f"{path} is no adapter of this text tower: tensors {problems[:5]} (of {len(problems)}) are missing, "
            "unknown, or of another shape"
        )


def of_adapter(parameter: str, name: str) -> bool:
    """Whether a parameter's name is one of the adapter's."""
    return re.search(rf"\.lora_\w+\.{re.escape(name)}(\.|$)", parameter) is not None


def inject(text_model: nn.Module, name: str, config: LoraConfig) -> None:
    config = copy.deepcopy(config)
    config.init_lora_weights = True  # whatever it was begun with, which may read or change the tower's weights
    required = {n.replace(".base_layer.", "."): p.requires_grad for n, p in text_model.named_parameters()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several is what is wanted
            inject_adapter_in_model(config, text_model, adapter_name=name)
    except ValueError as error:
        raise ValueError(f"adapter {name!r} does not fit the text tower: {error}") from error
    for path, parameter in text_model.named_parameters():  # injection freezes everything but the adapters
        if of_adapter(path, name):
            parameter.requires_grad_(name == ADAPTER_NAME)
        else:
            parameter.requires_grad_(required.get(path.replace(".base_layer.", "."), False))
    for layer in lora_layers(text_model):
        layer._disable_adapters = True
        layer.cast_input_dtype_enabled = False  # in bf16 training to fp32 and back again: no other values, only time


def lora_layers(module: nn.Module) -> list[LoraLayer]:
    return [m for m in module.modules() if isinstance(m, LoraLayer)]


@contextlib.contextmanager
def composing(text_model: nn.Module, adapter: str | None) -> Iterator[None]:
    """Within this context the composing adapter of that name acts in `text_model`, and no other; with None, none.

    PEFT's own switches also rewrite `requires_grad`, so the flags behind them are set here.
    """
    with _SWITCH:
        if adapter is not None and adapter not in text_model.peft_config:
            raise ValueError(f"composing adapter {adapter!r} was deleted meanwhile")
        layers = lora_layers(text_model)
        before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
        for layer in layers:
            layer._disable_adapters = adapter is None
            layer._active_adapter = layer._active_adapter if adapter is None else [adapter]
        try:
            yield
        finally:
            for layer, (disabled, active) in zip(layers, before, strict=True):
                layer._disable_adapters, layer._active_adapter = disabled, active


def uninitialised_lora_layers(module: nn.Module) -> list[LoraLayer]:
    """Adapter layers that no checkpoint has filled."""
    return [
        layer
        for layer in lora_layers(module)
        if not all(
            getattr(part[ADAPTER_NAME].weight, "_is_hf_initialized", False) for part in (layer.lora_A, layer.lora_B)
        )
    ]


def reset_to_identity(layers: list[LoraLayer]) -> None:
    """Make adapters act as nothing: A random, B zero."""
    for layer in layers:
        layer.reset_lora_parameters(ADAPTER_NAME, init_lora_weights=True)
