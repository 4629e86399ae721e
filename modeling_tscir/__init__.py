"""TSCIR: composed image retrieval on a frozen CLIP, in two stages."""

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_tscir import TASK, TSCIRConfig
from .images import BadImagesError
from .modeling_tscir import TSCIRModel, TSCIROutput
from .pipeline_tscir import ComposedImageRetrievalPipeline
from .processing_tscir import TSCIRProcessor


__version__ = "0.1.0"
__all__ = [
    "BadImagesError",
    "ComposedImageRetrievalPipeline",
    "Gallery",
    "GalleryError",
    "TSCIRConfig",
    "TSCIRModel",
    "TSCIROutput",
    "TSCIRProcessor",
]

MINIATURE_CHECKPOINT = Path(__file__).parent / "miniature_checkpoint"

AutoConfig.register(TSCIRConfig.model_type, TSCIRConfig, exist_ok=True)
AutoModel.register(TSCIRConfig, TSCIRModel, exist_ok=True)
AutoProcessor.register(TSCIRConfig, TSCIRProcessor, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(
    TASK,
    pipeline_class=ComposedImageRetrievalPipeline,
    pt_model=AutoModel,
    default={"model": (str(MINIATURE_CHECKPOINT), "main")},
    type="multimodal",
)
# Makes save_pretrained write the code beside the weights, for those who have no package.
TSCIRConfig.register_for_auto_class()
TSCIRModel.register_for_auto_class("AutoModel")
TSCIRProcessor.register_for_auto_class("AutoProcessor")

if TYPE_CHECKING:
    from .gallery import Gallery, GalleryError


def __getattr__(name: str):
    # When asked for: a gallery's pandas and PyArrow take as long to import as a tenth of all the rest.
    if name in ("Gallery", "GalleryError"):
        from . import gallery

        return getattr(gallery, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
