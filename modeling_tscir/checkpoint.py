"""Checkpoints of two forms: the whole model, or what was trained with the backbone by name, commit and fingerprint."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import CLIPModel, PreTrainedConfig
from transformers.utils import cached_file, logging

from .adapters import ADAPTER_CONFIG, ADAPTER_NAME, check_name, of_adapter
from .backbone import (
    BackboneNotFoundError,
    commit_of,
    load_backbone,
    refuse_other_forms,
    refuse_other_models,
    told_of_damage,
)
from .configuration_tscir import TSCIRConfig


logger = logging.get_logger(__name__)
DELTA_NAME = "tscir_delta.safetensors"
ADAPTERS = "adapters"
FULL_NAMES = ("model.safetensors", "model.safetensors.index.json")
SHARDS = "model-*-of-*.safetensors"
HUB = ("revision", "cache_dir", "token", "local_files_only", "subfolder", "force_download")
# Further arguments of PreTrainedModel.from_pretrained that change nothing where weights are read from a reference.
NEEDLESS = frozenset(
    (
        *("_commit_hash", "_from_auto", "_from_pipeline", "adapter_kwargs", "code_revision"),
        *("ignore_mismatched_sizes", "low_cpu_mem_usage", "max_memory", "offload_buffers", "offload_folder"),
        *("proxies", "tqdm_class", "trust_remote_code", "use_safetensors", "variant", "weights_only"),
    )
)
IN_PARTS = (
    "is for a checkpoint that is whole, and this is in reference form; write that by load and "
    'save_pretrained(FOLDER, backbone="full")'
)


def dtype_of(named: str | torch.dtype) -> torch.dtype:
    """A dtype by its name; "auto" is fp32. Raises `ValueError` for other words."""
    found = torch.float32 if named == "auto" else getattr(torch, named, None) if isinstance(named, str) else named
    if not isinstance(found, torch.dtype):
        raise ValueError(f'dtype is "auto" or one of torch\'s, such as "bfloat16", not {named!r}')
    return found


def one_device(device_map, path: str) -> torch.device:
    """The device that a device map names. Raises `ValueError` if it names several."""
    if isinstance(device_map, dict):
        if len(set(device_map.values())) != 1:
            raise ValueError(f"{path}: device_map {device_map} {IN_PARTS}")
        (device_map,) = set(device_map.values())
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return torch.device(device_map)


def adapters_in(folder: Path) -> list[str]:
    """Further adapters that a model saved there before has."""
    with contextlib.suppress(OSError, ValueError):  # nothing saved, or half of it
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("adapters", [])
    return []


@contextlib.contextmanager
def replacing(folder: Path, names: list[str]) -> Iterator[None]:
    """Files and folders of these names, or patterns of names, that lie in a folder are gone once what takes their
    place is written, and back, without anything new, if that fails."""

    def found() -> set[Path]:
        return {path for name in names for path in folder.glob(name)}

    def aside(path: Path) -> Path:
        return path.with_name(f".{path.name}.old")

    def remove(path: Path) -> None:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    for name in names:
        for old in folder.glob(str(aside(Path(name)))):
            remove(old)  # of a process that was killed
    before = found()
    for path in before:
        os.replace(path, aside(path))
    try:
        yield
    except BaseException:
        for path in found():
            remove(path)
        for path in before:
            os.replace(aside(path), path)
        raise
    for path in before:
        remove(aside(path))


class CheckpointMixin:
    """Loading and saving of [`TSCIRModel`]; stands before `PreTrainedModel` among its bases."""

    @classmethod
    def from_clip_pretrained(
        cls,
        model_name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        attn_implementation: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        **choices,
    ) -> "CheckpointMixin":
        """A stage 0 model around any CLIPModel checkpoint: ready to answer training-free, or to be trained.

        Args:
            model_name_or_path (`str`): Hub name or local folder of a CLIPModel checkpoint, in safetensors.
            revision (`str`, *optional*): branch, tag or commit on the Hub.
            dtype (`torch.dtype`): of the loaded weights.
            attn_implementation (`str`, *optional*): "sdpa", "eager", ...
            token, cache_dir, local_files_only: as `PreTrainedModel.from_pretrained` has them.
            choices: fields of [`TSCIRConfig`].

        Raises:
            ValueError: if the checkpoint is no CLIPModel, or lacks tensors. TypeError: for unknown choices.
        """
        if unknown := sorted(set(choices) - set(cls.config_class.__annotations__)):
            raise TypeError(f"unknown arguments {unknown}; choices are fields of TSCIRConfig")
        name = os.fspath(model_name_or_path)
        hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only or None}
        hub = {k: v for k, v in hub.items() if v is not None}
        clip, fingerprint, commit = load_backbone(name, revision, dtype, attn_implementation, **hub)
        config = TSCIRConfig(
            clip_config=clip.config.to_dict(),
            backbone_name_or_path=os.path.abspath(name) if os.path.isdir(name) else name,
            backbone_revision=commit,
            backbone_fingerprint=fingerprint,
            **choices,
        )
        return cls._around(config, clip)

    @classmethod
    def _around(cls, config: TSCIRConfig, clip: CLIPModel) -> "CheckpointMixin":
        """A model on a loaded backbone, whose weights are not touched."""
        for tensor in clip.state_dict(keep_vars=True).values():
            tensor._is_hf_initialized = True
        for module in clip.modules():
            module._is_hf_initialized = True
        config._attn_implementation = clip.config._attn_implementation
        return cls(config, backbone=clip).to(clip.dtype).eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, backbone=None, **kwargs):
        """Load a folder or Hub repository written by `save_pretrained`, of either form.

        Arguments are those of `PreTrainedModel.from_pretrained`, fields of [`TSCIRConfig`] among them. Weights are
        read from safetensors alone, in fp32 unless `dtype` says otherwise; a checkpoint in reference form goes onto
        one device.

        Args:
            backbone (`str`, *optional*): folder or Hub name where the backbone of a checkpoint in reference form lies
                now, if not where its config.json says; its fingerprint must be the same.

        Raises:
            ValueError: if the checkpoint is of another model type, is damaged, lacks tensors, wants code from
                elsewhere, or was trained on another backbone; and for what one in reference form cannot do.
        """
        former = kwargs.pop("torch_dtype", None)
        if kwargs.get("dtype") is None:
            kwargs["dtype"] = torch.float32 if former is None else former
        path = pretrained_model_name_or_path
        if path is None:
            return super().from_pretrained(path, *model_args, config=config, **kwargs)
        path = os.fspath(path)
        hub = {k: kwargs[k] for k in HUB if k in kwargs}
        refuse_other_models(path, hub)
        refuse_other_forms(path, hub)
        quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
        if cached_file(path, ADAPTER_CONFIG, **quiet, **hub) is not None:
            raise ValueError(
                f"{path} has an {ADAPTER_CONFIG} beside the model's; move that adapter into a folder of its own, and "
                "load it with model.load_adapter(FOLDER, NAME)"
            )
        if config is None:
            choices = {k: kwargs.pop(k) for k in [*kwargs] if k in cls.config_class.__annotations__}
            config = cls.config_class.from_pretrained(path, **hub, **choices)
        elif not isinstance(config, PreTrainedConfig):
            config = cls.config_class.from_pretrained(config)
        config.validate_choices()  # of which some may just have been told
        if backbone is not None:
            name = os.fspath(backbone)
            config.backbone_name_or_path = os.path.abspath(name) if os.path.isdir(name) else name
            config.backbone_revision = None
        delta = cached_file(path, DELTA_NAME, **quiet, **hub)
        commit = None if os.path.isdir(path) else commit_of(cached_file(path, "config.json", **quiet, **hub) or "")
        loading = kwargs.pop("output_loading_info", False)
        if delta is None:
            if backbone is not None:  # the folder has its own, which this one must be
                _, given, _ = load_backbone(os.fspath(backbone), None, torch.float32, None)
                if config.backbone_fingerprint and given != config.backbone_fingerprint:
                    raise ValueError(f"{path} was trained on another backbone than {backbone}: their weights differ")
            as_told = kwargs.get("ignore_mismatched_sizes")
            kwargs |= {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
            try:
                with told_of_damage(path):
                    model, info = super().from_pretrained(path, *model_args, config=config, **kwargs)
            except OSError as error:
                if any(cached_file(path, name, **quiet, **hub) for name in FULL_NAMES):
                    raise
                told = f"{path} has neither {FULL_NAMES[0]} nor {DELTA_NAME}, its weights; fetch or write them again"
                raise OSError(f"{told} ({error})") from error
            mismatched = [] if as_told else [name for name, *_ in info["mismatched_keys"]]
            if problems := sorted({*info["missing_keys"], *info["unexpected_keys"], *mismatched}):
                raise ValueError(f"{path} does not fit its config.json: tensors {problems[:5]} (of {len(problems)})")
            model.hub_commit = commit
            model.load_further_adapters(path, hub)
            return (model, info) if loading else model
        dtype, attention, device = (kwargs.pop(k, None) for k in ("dtype", "attn_implementation", "device_map"))
        if kwargs.pop("quantization_config", None) is not None:
            raise ValueError(f"{path}: quantization_config {IN_PARTS}")
        told = {k for k, v in kwargs.items() if v is not None and v is not False}
        unknown = sorted(told - NEEDLESS - set(HUB))
        if model_args or unknown:
            raise TypeError(f"{path}: unknown arguments {[*model_args, *unknown]}")
        own = {k: v for k, v in hub.items() if k not in ("revision", "subfolder")}
        model = cls._from_delta(config, delta, dtype_of(dtype), attention, own)
        if device is not None:
            model.to(one_device(device, path))
        model.name_or_path, model.hub_commit = path, commit
        model.load_further_adapters(path, hub)
        if loading:
            return model, {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
        return model

    def load_further_adapters(self, path: str, hub: dict) -> None:
        """Those that `save_pretrained` wrote into folders of their own."""
        for name in self.config.adapters:
            place = "/".join(filter(None, (hub.get("subfolder"), ADAPTERS, check_name(name))))
            self.load_adapter(path, name, **{**hub, "subfolder": place})

    @classmethod
    def _from_delta(
        cls, config: TSCIRConfig, delta: str, dtype: torch.dtype, attn: str | None, hub: dict
    ) -> "CheckpointMixin":
        name = config.backbone_name_or_path
        beside = Path(delta).parent / (name or "")
        if name and not os.path.isabs(name) and beside.is_dir():
            name = config.backbone_name_or_path = str(beside.resolve())  # so that it is found wherever it is saved
        try:
            clip, fingerprint, _ = load_backbone(name, config.backbone_revision, dtype, attn, **hub)
        except BackboneNotFoundError as error:
            remedy = (
                "If it lies elsewhere now, name that: TSCIRModel.from_pretrained(..., backbone=FOLDER_OR_HUB_NAME)"
            )
            if config.backbone_revision is None:
                raise BackboneNotFoundError(f"{error}. {remedy}.") from error
            # A rewritten history may have lost the commit and kept the weights, which the fingerprint tells.
            try:
                clip, fingerprint, _ = load_backbone(name, None, dtype, attn, **hub)
            except BackboneNotFoundError:
                raise BackboneNotFoundError(f"{error}. {remedy}.") from error
            logger.warning(f"{name} has no commit {config.backbone_revision} any more; taking its newest")
        if config.backbone_fingerprint and fingerprint != config.backbone_fingerprint:
            raise ValueError(
                f"{delta} was trained on another backbone than {name} now holds (fingerprint "
                f"{config.backbone_fingerprint}, found {fingerprint}); its pseudo-words mean nothing to this one. "
                "Name the original weights: TSCIRModel.from_pretrained(..., backbone=FOLDER_OR_HUB_NAME)."
            )
        model = cls._around(config, clip)
        with told_of_damage(delta), safe_open(delta, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        shapes, wanted = ({k: v.shape for k, v in x.items()} for x in (tensors, model.delta_state_dict()))
        if problems := sorted({name for name, _ in shapes.items() ^ wanted.items()}):
            raise ValueError(f"{delta} does not fit its config.json: tensors {problems[:5]} (of {len(problems)})")
        model.load_state_dict(tensors, strict=False)
        return model

    def delta_state_dict(self, given: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """What was trained: the mapper's tensors and the composing adapters', as they are or as `given`."""
        tensors = self.own_state_dict(given).items()
        return {k: v for k, v in tensors if k.startswith("mapper.") or ".lora_" in k}

    def trained_fingerprint(self, dtype: torch.dtype | None = None) -> str | None:
        """Digest of what was trained, which tells this model from any other; None for a plain CLIP. With `dtype` that
        of the model loaded in it."""
        digest = hashlib.sha256()
        for key, tensor in sorted(self.delta_state_dict().items()):
            values = tensor.detach().to(dtype or tensor.dtype).float().cpu().contiguous()
            digest.update(key.encode() + values.numpy().tobytes())
        return digest.hexdigest()[:32] if self.config.stage else None

    def own_state_dict(self, given: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """Every tensor, or every one of those `given`, but those of further composing adapters, which have folders of
        their own."""
        layers = self.clip.text_model.named_modules(prefix="clip.text_model")
        wrapped = [path for path, m in layers if isinstance(m, LoraLayer) and ADAPTER_NAME not in m.lora_A]
        bare = {f"{path}.base_layer.": f"{path}." for path in wrapped}  # by further adapters alone
        tensors = {}
        for name, tensor in (self.state_dict() if given is None else given).items():
            if ".lora_" in name and not of_adapter(name, ADAPTER_NAME):
                continue
            layer = f"{name.rpartition('.')[0]}."
            tensors[name.replace(layer, bare[layer]) if layer in bare else name] = tensor
        return tensors

    def save_pretrained(self, save_directory, backbone: str = "full", **kwargs):
        """Write a folder that `from_pretrained` reads, on its own or as remote code.

        Args:
            save_directory (`str`): the folder.
            backbone (`str`): "full" writes every tensor; "reference" writes mapper and adapters, and the backbone by
                name, commit and fingerprint.
            kwargs: those of `PreTrainedModel.save_pretrained`; of a `state_dict` what belongs to the chosen form.

        Raises:
            ValueError: for what cannot be written: a reference to a backbone without a name, a `state_dict` that lacks
                tensors, or what is to be uploaded at once, which `push_to_hub` does whole.
        """
        if backbone not in ("full", "reference"):
            raise ValueError(f'backbone must be "full" or "reference", not {backbone!r}')
        if kwargs.pop("push_to_hub", False):  # of which transformers would leave code and further adapters behind
            raise ValueError("upload by model.push_to_hub(REPOSITORY, ...), which saves and uploads everything")
        folder, given = Path(save_directory), kwargs.pop("state_dict", None)
        if given is not None and (lacking := sorted(self.state_dict().keys() - given.keys())):
            raise ValueError(f"state_dict lacks {lacking[:3]} (of {len(lacking)})")
        if backbone == "reference":
            if not self.config.backbone_name_or_path:
                raise ValueError('this model does not know its backbone\'s name; save it with backbone="full"')
            kwargs.pop("max_shard_size", None)  # which is one small file
            delta = {k: v.contiguous() for k, v in self.delta_state_dict(given).items()}
            kwargs["state_dict"] = dict(delta)  # saving empties what it is given
        further = [name for name in self.adapter_names if name != ADAPTER_NAME]
        if backbone == "full" and (self.adapter_names or given is not None):
            kwargs["state_dict"] = dict(self.own_state_dict(given))
        self.config.adapters = further
        if not kwargs.get("is_main_process", True):
            super().save_pretrained(folder, **kwargs)
            return
        # Both forms in one folder would contradict each other.
        adapters = [f"{ADAPTERS}/{check_name(name)}" for name in adapters_in(folder)]
        with replacing(folder, ["config.json", DELTA_NAME, *FULL_NAMES, SHARDS, *adapters]):
            for name in further:
                self.save_adapter(folder / ADAPTERS / name, name)
            super().save_pretrained(folder, **kwargs)
            if backbone == "reference":
                (folder / FULL_NAMES[0]).unlink(missing_ok=True)
                save_file(delta, folder / DELTA_NAME, metadata={"format": "pt"})
            for path in folder.glob("*.safetensors"):  # which safetensors lets its owner alone read
                shutil.copymode(folder / "config.json", path)
        with contextlib.suppress(OSError):  # unless others lie there
            (folder / ADAPTERS).rmdir()

    def push_to_hub(
        self,
        repo_id: str,
        *,
        processor=None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        **repository,
    ):
        """Upload a complete repository: weights, config, code, model card and, if given, the processor.

        Args:
            repo_id (`str`): "user/name"; made if need be.
            repository: further arguments of [`publishing.write_repository`], such as `backbone` and `results`.

        Returns:
            `huggingface_hub`'s CommitInfo.
        """
        from .publishing import upload_repository, write_repository

        with tempfile.TemporaryDirectory() as folder:
            write_repository(folder, self, processor, repo_id=repo_id, **repository)
            return upload_repository(
                folder,
                repo_id,
                private=private,
                token=token,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
            )
