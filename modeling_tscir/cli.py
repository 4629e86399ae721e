"""The command line: `tscir index`, `tscir search`, `tscir info` and `tscir serve`."""

import argparse
import difflib
import json
import os
import re
import sys
from pathlib import Path


# torch, transformers and the rest are imported where they are needed, so that a mistake is told before they load.
DESCRIPTION = """Search pictures by a picture and a text that changes it.

  tscir index PHOTOS --output G                       embed a folder's pictures, again only what changed
  tscir search G --image dress.jpg --text "in red"    the pictures of G nearest to the change
  tscir info G                                        what a gallery holds
  tscir serve G                                       a page in the browser
"""
MODEL_HELP = (
    "trained TSCIR folder, Hub name, or a plain CLIP such as openai/clip-vit-base-patch32, which answers training-free"
)
PRECISION_HELP = "what the model computes in; float16 on a GPU and float32 on a CPU unless told"
QUERY_HELP = """A query is made of --image, --id and --text in the order they are given:

  --image a.jpg --text "with long sleeves"                 a change of a picture
  --image a.jpg                                            pictures like it
  --text "a red dress"                                     pictures that fit a text
  --image a.jpg --text "in the colour of" --image b.jpg    several pictures
  --id shirts/7.jpg --text "without a collar"              a change of a result found before
"""


class InOrder(argparse.Action):
    """Keeps the parts of a query in the order they were given."""

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.parts = [*(namespace.parts or []), (self.dest, values)]


def make_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tscir", description=DESCRIPTION, formatter_class=raw)
    from . import __version__

    parser.add_argument("--version", action="version", version=f"tscir {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    index = commands.add_parser(
        "index",
        help="embed a folder's pictures into a gallery, or bring one up to date",
        description="Embed the pictures of a folder and below. Run again, only new and changed files are embedded, "
        "also after an interruption. Under `accelerate launch -m modeling_tscir.cli index ...` processes share it.",
    )
    index.add_argument("folder", type=Path, help="pictures, searched below as well")
    index.add_argument("--output", "-o", required=True, metavar="G", help="the gallery, made if need be")
    index.add_argument("--model", help=MODEL_HELP + "; the gallery's own if it has one already")
    index.add_argument("--prefix", default="", help="put before ids, so that several folders go into one gallery")
    index.add_argument("--metadata", type=Path, help="CSV, JSON Lines or Parquet with a column file_name")
    index.add_argument("--dtype", choices=["float16", "float32"], help="of stored embeddings; float16 unless told")
    index.add_argument("--batch_size", type=int, default=32, help="pictures a forward pass")
    index.add_argument("--shard_size", type=int, default=2048, help="pictures that an interruption may cost")
    index.add_argument("--index", metavar="FACTORY", help='a FAISS index, such as "IVF4096,PQ64"; "none" drops it')
    index.add_argument("--strict", action="store_true", help="exit with 1 if any file could not be used")

    search = commands.add_parser(
        "search", help="search a gallery", description=QUERY_HELP, formatter_class=raw,
        usage="tscir search G [--image PATH | --id ID | --text TEXT] ... [options]",
    )  # fmt: skip
    search.add_argument("gallery", metavar="G")
    search.add_argument("--image", action=InOrder, metavar="PATH", help="a picture's path or URL")
    search.add_argument("--id", action=InOrder, metavar="ID", help="a picture of the gallery by its id")
    search.add_argument("--text", action=InOrder, metavar="TEXT", help="a text")
    search.add_argument("--model", help=MODEL_HELP + "; the one the gallery was made with unless told")
    search.add_argument("--top_k", "-k", type=int, default=10, help="how many results (10)")
    search.add_argument("--weight", type=float, help="-1 to 1: towards the picture or the text (the model's own)")
    search.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="CONDITION",
        help="on metadata, such as price<50; all must hold",
    )
    search.add_argument("--exact", action="store_true", help="leave the gallery's FAISS index aside")
    search.add_argument("--json", action="store_true", help="results as JSON, and nothing else on stdout")
    search.add_argument("--html", type=Path, metavar="FILE", help="results as a page that stands alone")
    search.add_argument("--png", type=Path, metavar="FILE", help="results as a contact sheet")
    search.set_defaults(parts=None)

    info = commands.add_parser("info", help="what a gallery holds, and what could not be used")
    info.add_argument("gallery", metavar="G")
    info.add_argument("--json", action="store_true", help="as JSON")

    serve = commands.add_parser("serve", help="a page in the browser (needs gradio)")
    serve.add_argument("gallery", metavar="G")
    serve.add_argument("--model", help=MODEL_HELP + "; the one the gallery was made with unless told")
    serve.add_argument("--host", default="127.0.0.1", help="127.0.0.1, this machine alone, unless told")
    serve.add_argument("--port", type=int, default=7860)
    for command in (index, search, serve):
        command.add_argument("--precision", choices=["float32", "bfloat16", "float16"], help=PRECISION_HELP)
    for command in commands.choices.values():
        command.set_defaults(parser=command)
    return parser


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """As argparse does, but that an unknown flag is told with its command's usage and the flag that it resembles."""
    args, unknown = make_parser().parse_known_args(arguments)
    if unknown:
        near = difflib.get_close_matches(unknown[0], args.parser._option_string_actions, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
    return args


def load_pipeline(name: str, precision: str | None = None):
    """A pipeline around a trained folder, a Hub name, or a plain CLIP. Unless told it computes in float16 where there
    is a GPU, which rankings hardly notice (eval/speed/precision.py), and else in float32."""
    import torch
    from transformers import PreTrainedConfig
    from transformers.utils import logging

    from . import ComposedImageRetrievalPipeline, TSCIRModel, TSCIRProcessor
    from .backbone import why_not

    logging.disable_progress_bar()
    try:
        kind = PreTrainedConfig.get_config_dict(name)[0].get("model_type")
    except (OSError, ValueError) as error:
        why = why_not(name, error)
        raise ValueError(f"the model {name!r} cannot be found or read: {why}; --model names another place") from error
    load = "from_pretrained" if kind == "tscir" else "from_clip_pretrained"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, precision or ("float32" if device == "cpu" else "float16"))
    model, processor = getattr(TSCIRModel, load)(name, dtype=dtype), getattr(TSCIRProcessor, load)(name)
    if model.mapper is None:
        tell(f"{name} is a plain CLIP: answering training-free, by slerp between picture and text.")
    return ComposedImageRetrievalPipeline(model=model, processor=processor, device=device)


def tell(text: str) -> None:
    """To people; stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def nearest_file(path: Path) -> Path | None:
    """`path` itself or the folder above it that is a file, if one is."""
    return next((one for one in (path, *path.parents) if one.is_file()), None)


def model_of(gallery, given: str | None) -> str:
    """The model that was named, or the one the gallery remembers."""
    from .gallery import GalleryError

    name = given or (gallery.info.get("model") if gallery is not None else None)
    if not name:
        raise GalleryError(
            "name a model: --model FOLDER, HUB NAME or a plain CLIP such as openai/clip-vit-base-patch32"
        )
    return name


def run_index(args: argparse.Namespace) -> int:
    from .gallery import Gallery
    from .gallery_index import empty
    from .indexing import Processes
    from .indexing_plan import checked_prefix
    from .metadata import read_metadata
    from .milvus import holds_gallery, is_milvus
    from .milvus_gallery import MilvusGallery, open_gallery

    if not args.folder.is_dir():
        raise ValueError(f"{args.folder} is not a folder")
    if is_milvus(args.output):
        if args.dtype == "float16":
            raise ValueError("--dtype float16 is for galleries in folders; Milvus stores float32")
        if args.index is not None:
            raise ValueError("--index is for galleries in folders; Milvus keeps an index of its own")
    elif taken := nearest_file(Path(args.output)):
        raise ValueError(f"--output {args.output}: {taken} is a file; name a folder")
    processes = Processes()  # before the model, as it chooses each process's GPU
    # Refuses what is wrong with metadata before any work.
    processes.same(lambda: read_metadata(args.folder, args.metadata, checked_prefix(args.prefix)) is None)
    there = holds_gallery if is_milvus(args.output) else lambda folder: (Path(folder) / "gallery.json").is_file()
    name = args.model or model_of(open_gallery(args.output) if there(args.output) else None, None)
    cir = load_pipeline(name, args.precision)
    if is_milvus(args.output):
        gallery = MilvusGallery.open_or_create(args.output, cir.model, cir.processor)
    else:
        gallery = Gallery.open_or_create(args.output, cir.model, cir.processor, args.dtype)
    if args.index is not None and processes.main:
        if args.index == "none":
            gallery.drop_index()
        else:  # the one there is stays until the pictures are in and another is built
            empty(args.index, gallery.info["dimensions"])  # refuses what FAISS does not know, before any work
    if processes.main:
        gallery.remember(model=str(Path(name).resolve()) if Path(name).is_dir() else name)
    report = gallery.add(
        args.folder,
        cir.model,
        cir.processor,
        prefix=args.prefix,
        metadata=args.metadata,
        batch_size=args.batch_size,
        shard_size=args.shard_size,
    )
    processes.end()
    if not processes.main:
        return 0
    for line in report.sentences():
        tell(line)
    if args.index not in (None, "none"):
        gallery.build_index(args.index)
    if "index" in gallery.info:
        built = gallery.info["index"]
        tell(
            f"index {built['factory']}: finds {100 * built['recall_at_10']:.1f}% of the exact ten best "
            f"({built['queries']} queries between two pictures)."
        )
    tell(f"{args.output} holds {len(gallery)} pictures.")
    return 1 if args.strict and report.unreadable else 0


def parse_condition(text: str) -> tuple[str, str, str]:
    """Column, operator and value of "price<=50", split at the first operator."""
    found = re.fullmatch(r"(.*?)\s*(<=|>=|!=|==?|<|>)\s*(.*)", text, re.DOTALL)
    if found is None or not found[1].strip():
        raise ValueError(f"--where {text!r}: write it as column=value, with one of = != < <= > >=")
    return found[1].strip(), found[2], found[3]


def run_search(args: argparse.Namespace) -> int:
    from .files import printable
    from .images import is_url
    from .metadata import conditions_of
    from .milvus_gallery import open_gallery

    if not args.parts:
        raise ValueError("a query needs --image, --id or --text")
    if args.top_k < 1:
        raise ValueError(f"--top_k must be at least 1, not {args.top_k}")
    if args.weight is not None and not -1 <= args.weight <= 1:
        raise ValueError(f"--weight must be between -1 and 1, not {args.weight}")
    conditions = [parse_condition(text) for text in args.where]
    for path, known in ((args.html, (".html", ".htm")), (args.png, (".png", ".jpg", ".jpeg", ".webp"))):
        if path is not None and (path.suffix.lower() not in known or not path.parent.is_dir()):
            raise ValueError(f"{path}: name a file in a folder that is there, ending in {' or '.join(known)}")
    gallery = open_gallery(args.gallery)
    if len(gallery) == 0:
        raise ValueError(f"{args.gallery} holds no pictures; index some: tscir index PHOTOS --output {args.gallery}")
    conditions_of(conditions, gallery.columns, args.gallery)  # refuses what is wrong with them
    for kind, value in args.parts:
        if kind == "id" and value not in gallery:
            raise ValueError(f"{args.gallery} holds no picture with the id {value!r}")
        if kind == "image" and not is_url(value) and not os.path.exists(value):
            raise ValueError(f"--image {value}: missing")
    cir = load_pipeline(model_of(gallery, args.model), args.precision)
    gallery.check(cir.model, cir.processor)
    content = []
    for kind, value in args.parts:
        content.append(value if kind == "text" else {"image": gallery.source(value) if kind == "id" else value})
    queries = cir.embed(content=content, weight=args.weight)
    own = [value for kind, value in args.parts if kind == "id"]
    (results,) = gallery.search(queries, args.top_k, conditions, exclude=own, exact=args.exact)
    if args.json:
        print(json.dumps(results, indent=2, default=str))
    else:
        print_table(results)
    if conditions and not results:
        asked = " ".join(f"--where {text!r}" for text in args.where)
        other = "other " if own else ""  # which the query's own may meet
        tell(f"no {other}picture meets {asked}; a value stands without quotes, and each --where holds one condition")
    if args.html or args.png:
        from .contact_sheet import write_html, write_png

        gone = [result["path"] for result in results if result["path"] and not os.path.exists(result["path"])]
        if gone:
            tell(
                f"{len(gone)} of {len(results)} pictures are not where they were indexed, such as "
                f"{printable(gone[0])}; if they moved: tscir index THEIR_FOLDER --output {args.gallery}"
            )

        if args.html:
            write_html(args.html, gallery, content, results)
            tell(f"written: {args.html}")
        if args.png:
            write_png(args.png, gallery, content, results)
            tell(f"written: {args.png}")
    return 0


def print_table(results: list[dict]) -> None:
    from .files import printable

    width = max((len(printable(r["id"])) for r in results), default=2)
    print(f"{'score':>6}  {'id':{width}}  more")
    for result in results:
        more = [printable(f"{key}={value}") for key, value in result["metadata"].items() if value is not None]
        more += [f"same as {printable(name)}" for name in result["duplicates"]]
        print(f"{result['score']:6.3f}  {printable(result['id']):{width}}  {', '.join(more)}".rstrip())
    if not results:
        print("nothing found")


def run_info(args: argparse.Namespace) -> int:
    from .files import printable
    from .milvus_gallery import open_gallery

    gallery = open_gallery(args.gallery)
    duplicates = gallery.duplicates()
    unreadable = gallery.unreadable
    if args.json:
        content = gallery.info | {"pictures": len(gallery), "columns": gallery.columns, "duplicates": duplicates}
        content["unreadable"] = unreadable
        print(json.dumps(content, indent=2))
        return 0
    print(f"{args.gallery}: {len(gallery)} pictures")
    print(f"model       {gallery.info.get('model', 'unknown')} (tscir {gallery.info['tscir_version']})")
    print(f"embeddings  {gallery.info['dimensions']} x {gallery.info['dtype']}")
    index = gallery.info.get("index")
    if index:
        print(f"index       {index['factory']}, recall@10 {index['recall_at_10']:.3f} against exact search")
    columns = ", ".join(f"{printable(name)} ({kind})" for name, kind in gallery.columns.items())
    print(f"metadata    {columns or 'none'}")
    print(f"duplicates  {sum(len(group) - 1 for group in duplicates)} pictures have another's bytes")
    for group in duplicates[:10]:
        print(f"  {' = '.join(map(printable, group))}")
    if len(duplicates) > 10:
        print(f"  and {len(duplicates) - 10} groups more; --json has all")
    print(f"unreadable  {len(unreadable)} at the last indexing")
    for bad in unreadable:
        print(f"  {printable(bad['id'])}: {bad['reason']}")
    return 0


def run_serve(args: argparse.Namespace) -> int:
    from .gallery import GalleryError
    from .milvus_gallery import open_gallery

    try:
        from .page import make_page, serve
    except ImportError as error:
        raise GalleryError(f"the page needs Gradio: pip install gradio ({error})") from error
    gallery = open_gallery(args.gallery)
    if len(gallery) == 0:
        raise ValueError(f"{args.gallery} holds no pictures; index some: tscir index PHOTOS --output {args.gallery}")
    cir = load_pipeline(model_of(gallery, args.model), args.precision).index(gallery)
    cir.model.merge_adapter()
    try:
        serve(make_page(cir), args.host, args.port)
    except (OSError, OverflowError) as error:  # the second for a port beyond 65535
        raise ValueError(f"port {args.port} of {args.host} cannot be had; name another: --port ({error})") from error
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, 1 with --strict over unreadable files, 2 for mistakes, 130 when interrupted, 141 when nobody reads
    on, as with `| head`."""
    args = parse_arguments(arguments)
    run = {"index": run_index, "search": run_search, "info": run_info, "serve": run_serve}[args.command]
    try:
        code = run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python would flush at its end
        return 141
    except KeyboardInterrupt:
        tell("interrupted; run the same again to go on")
        return 130
    except (ValueError, OSError) as error:  # GalleryError and BadImagesError are ValueErrors
        tell(f"tscir: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
