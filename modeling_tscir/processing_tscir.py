"""TSCIRProcessor: images and texts to model inputs, with places for pseudo-words that no user's text can forge."""

from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import ProcessorMixin
from transformers.feature_extraction_utils import BatchFeature
from transformers.utils import logging

from .images import ImageSource, load_named, middle, pad_to_aspect_ratio


logger = logging.get_logger(__name__)
MAX_LENGTH = 77
PROMPT_TEMPLATE, IMAGE_TEMPLATE = "{image} {text}", "{image}"


class TSCIRProcessor(ProcessorMixin):
    """Prepare images, texts, and composed queries.

    Args:
        image_processor (`CLIPImageProcessorPil`): CLIP's own.
        tokenizer (`CLIPTokenizer`): CLIP's own; no token is added to it.
        num_pseudo_words (`int`): M, how many places `{image}` takes.
        prompt_template (`str`): of composed queries, with one `{image}` and one `{text}` after it. By default they
            have no words of their own; the field's usual prompt is "a photo of {image} that {text}".
        image_template (`str`): of an image alone, with one `{image}`; stage I and empty modifications use it.
        padded_aspect_ratio (`float`, *optional*): pictures longer than this for their width, or wider than this for
            their height, are first padded with black to it: 1 pads every picture to a square, 1.25 is the target
            padding of CLIP4Cir and SEARLE. `None`, CLIP's own way, lets the centre crop cut off what is too long.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        num_pseudo_words: int = 4,
        prompt_template: str = PROMPT_TEMPLATE,
        image_template: str = IMAGE_TEMPLATE,
        padded_aspect_ratio: float | None = None,
        **kwargs,
    ):
        self.num_pseudo_words = num_pseudo_words
        self.prompt_template = prompt_template
        self.image_template = image_template
        self.padded_aspect_ratio = padded_aspect_ratio
        super().__init__(image_processor, tokenizer, **kwargs)
        self.checked_template(prompt_template)
        if image_template.count("{image}") != 1:
            raise ValueError(f"image_template needs one {{image}}: {image_template!r}")
        if num_pseudo_words < 1:
            raise ValueError(f"num_pseudo_words must be at least 1, not {num_pseudo_words}")
        if padded_aspect_ratio is not None and padded_aspect_ratio < 1:
            raise ValueError(f"padded_aspect_ratio is the longer side over the shorter, not {padded_aspect_ratio}")

    @staticmethod
    def checked_template(prompt_template: str) -> str:
        """A template of composed queries, or a `ValueError` that says what is wrong with it."""
        if prompt_template.count("{image}") != 1 or prompt_template.count("{text}") != 1:
            raise ValueError(f"prompt_template needs one {{image}} and one {{text}}: {prompt_template!r}")
        if prompt_template.index("{image}") > prompt_template.index("{text}"):
            raise ValueError(f"{{image}} must come before {{text}} in prompt_template: {prompt_template!r}")
        return prompt_template

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs) -> "TSCIRProcessor":
        """As `ProcessorMixin.from_pretrained`. Raises `ValueError` where there is no processor, or half of one."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except OSError as error:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds no processor that can be read ({str(error).splitlines()[0]}); "
                "write one beside the model with TSCIRProcessor.save_pretrained, or name a CLIP's for "
                "TSCIRProcessor.from_clip_pretrained"
            ) from error

    @classmethod
    def from_clip_pretrained(cls, model_name_or_path, num_pseudo_words: int = 4, **kwargs) -> "TSCIRProcessor":
        """The processor of a plain CLIP checkpoint; `kwargs` are this class's own arguments or `revision`.

        Raises:
            ValueError: if there is no tokenizer.
        """
        from transformers import AutoTokenizer, CLIPImageProcessorPil

        hub = {k: kwargs.pop(k) for k in ("revision", "cache_dir", "token", "local_files_only") if k in kwargs}
        image_processor = CLIPImageProcessorPil.from_pretrained(model_name_or_path, **hub)
        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, **hub)
        if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):  # transformers made an empty one
            raise ValueError(
                f"{model_name_or_path} holds no tokenizer: its texts would have no words. Put the CLIP's "
                "tokenizer.json there, or vocab.json and merges.txt"
            )
        return cls(image_processor, tokenizer, num_pseudo_words=num_pseudo_words, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return ["pixel_values", "input_ids", "attention_mask", "pseudo_mask", "modification_ids", "modification_mask"]

    @property
    def max_length(self) -> int:
        return min(self.tokenizer.model_max_length, MAX_LENGTH)

    def __call__(
        self,
        images: ImageSource | list[ImageSource] | None = None,
        text: str | list[str] | None = None,
        return_tensors: str = "pt",
        **kwargs,
    ) -> BatchFeature:
        """Model inputs.

        With `images` alone: pixel_values [B, 3, H, W]. With `text` alone: input_ids and attention_mask [B, L] of plain
        texts. With both, composed queries: these, the prompt with pseudo_mask [B, L], and the modification alone as
        modification_ids and modification_mask [B, L']. Texts are padded to the longest of their batch.

        Args:
            images: one picture or a list: PIL image, path, URL or bytes.
            text: one text or a list of the same length; may be empty.

        Raises:
            ValueError: for numbers of images and texts that differ, or a picture that cannot be read.
        """
        if unknown := sorted(set(kwargs) - {"padding", "truncation"}):
            raise TypeError(f"unknown arguments {unknown}; known are images, text and return_tensors")
        if not {kwargs.get("padding", True), kwargs.get("truncation", True)} <= {True, "longest", "longest_first"}:
            raise ValueError("texts are padded to the longest of their batch and cut at CLIP's length, always")
        if images is None and text is None:
            raise ValueError("give images, text, or both")
        for name, given in (("images", images), ("text", text)):
            if isinstance(given, (list, tuple)) and not given:
                raise ValueError(f"{name} is an empty list")
        data: dict[str, torch.Tensor] = {}
        texts = [text] if isinstance(text, str) else None if text is None else list(text)
        for number, one in enumerate(texts or ()):
            if not isinstance(one, str):
                raise ValueError(f"text {number} is a string, not {one!r}")
        if images is not None:
            images = list(images) if isinstance(images, (list, tuple)) else [images]
            if texts is not None and len(images) != len(texts):
                raise ValueError(f"{len(images)} images and {len(texts)} texts; a composed query needs one of each")
            data["pixel_values"] = self.pixel_values(images)
        if texts is not None:
            plain = self.tokenize(texts)
            if images is None:
                data |= {"input_ids": plain["input_ids"], "attention_mask": plain["attention_mask"]}
            else:
                data |= self.compose(texts)
                data |= {"modification_ids": plain["input_ids"], "modification_mask": plain["attention_mask"]}
        return BatchFeature(data, tensor_type=return_tensors)

    def pixel_values(self, images: list[ImageSource]) -> torch.Tensor:
        """Pictures as the vision tower reads them, [B, 3, H, W], several in threads.

        Raises:
            ValueError: for one that cannot be read.
        """
        distinct = {id(image): image for image in images}  # two threads must not load one picture
        threads = min(len(distinct), torch.get_num_threads())  # one in a worker process
        if threads == 1:
            pixels = list(map(self._pixels, distinct.values()))
        else:
            with ThreadPoolExecutor(threads) as pool:  # decoding leaves the interpreter's lock alone
                pixels = list(pool.map(self._pixels, distinct.values()))
        pixels_of = dict(zip(distinct, pixels, strict=True))
        return torch.cat([pixels_of[id(image)] for image in images])

    def _pixels(self, image: ImageSource) -> torch.Tensor:
        picture = load_named(image)
        if self.padded_aspect_ratio is not None:
            picture = pad_to_aspect_ratio(picture, self.padded_aspect_ratio)
        return self.image_processor([middle(picture)], return_tensors="pt").pixel_values  # [1, 3, H, W]

    def tokenize(self, texts: list[str]) -> dict[str, torch.Tensor]:
        """Plain texts: input_ids and attention_mask [B, L], L the longest of the batch, at most 77."""
        return self.padded(self.token_ids(texts))

    def token_ids(self, texts: list[str]) -> list[list[int]]:
        """Ids of plain texts, each with its start and end, at most 77."""
        pieces, room = self._pieces(texts), self.max_length - 2
        return [[self.tokenizer.bos_token_id, *self._cut(ids, room), self.tokenizer.eos_token_id] for ids in pieces]

    def compose(self, texts: list[str], captions: list[str] | None = None) -> dict[str, torch.Tensor]:
        """Prompts with places for pseudo-words: input_ids, attention_mask and boolean pseudo_mask, [B, L].

        A text that is too long is cut at its own end, so that the pseudo-words, the rest of the prompt and EOS stay.
        An empty text gives the prompt of the image alone.

        Args:
            texts: modifications.
            captions: of the images, to stand where their pseudo-words would; pseudo_mask is False then. At most half
                of what the text encoder reads is given to them.
        """
        rows, starts = [], []
        pieces = [None] * len(texts) if captions is None else self._pieces(captions)
        templates = self._templates()
        for ids, caption_ids in zip(self._pieces(texts), pieces, strict=True):
            row, start = self._prompt(ids, templates, caption_ids)
            rows.append(row)
            starts.append(start)
        batch = self.padded(rows)
        places = torch.arange(batch["input_ids"].shape[1])[None, :]
        first = torch.tensor(starts)[:, None]
        count = self.num_pseudo_words if captions is None else 0
        batch["pseudo_mask"] = (places >= first) & (places < first + count)
        return batch

    def compose_contents(self, contents: list[list[str | None]]) -> dict[str, torch.Tensor]:
        """Prompts with several pictures and texts in any order, as `compose` gives them.

        One picture and then at most one text are what `compose` makes of them. Other contents stand as they are given
        behind the beginning of the prompt, such as "a photo of", if it has one.

        Args:
            contents: for each query its texts, and None for each picture, of which there is at least one.

        Raises:
            ValueError: if a query's pictures alone are more than the text encoder reads.
        """
        rows, masks, templates = [], [], self._templates()
        beginning = templates[True][0]
        for content in contents:
            if content[0] is None and len(content) <= 2 and None not in content[1:]:
                (text_ids,) = self._pieces(content[1:] or [""])
                row, start = self._prompt(text_ids, templates)
                rows.append(row)
                masks.append([start <= place < start + self.num_pseudo_words for place in range(len(row))])
                continue
            pictures = content.count(None)
            room = self.max_length - 2 - len(beginning) - pictures * self.num_pseudo_words
            if room < 0:
                raise ValueError(f"{pictures} pictures in one query are more than the text encoder reads")
            row, mask = [self.tokenizer.bos_token_id, *beginning], [False] * (1 + len(beginning))
            for text in content:
                if text is None:
                    ids = [self.tokenizer.bos_token_id] * self.num_pseudo_words
                else:
                    ids = self._cut(self._pieces([text])[0], room)
                    room -= len(ids)
                row += ids
                mask += [text is None] * len(ids)
            rows.append([*row, self.tokenizer.eos_token_id])
            masks.append([*mask, False])
        batch = self.padded(rows)
        width = batch["input_ids"].shape[1]
        batch["pseudo_mask"] = torch.tensor([mask + [False] * (width - len(mask)) for mask in masks])
        return batch

    def _templates(self) -> dict[bool, list[list[int]]]:
        """Ids before the picture, between it and the text, and after that, of prompts with a text and without."""
        before, after = self.prompt_template.split("{image}")
        pieces = self._pieces([before, *after.split("{text}"), *self.image_template.split("{image}"), ""])
        return {True: pieces[:3], False: pieces[3:]}

    def _prompt(
        self, text_ids: list[int], templates: dict[bool, list[list[int]]], caption_ids: list[int] | None = None
    ) -> tuple[list[int], int]:
        """Token ids of one prompt, and where its pseudo-words, or the caption in their place, start."""
        before, between, end = templates[bool(text_ids)]
        if caption_ids is None:
            # Any id will do where a pseudo-word goes: its embedding is replaced by position, never by id.
            places = [self.tokenizer.bos_token_id] * self.num_pseudo_words
        else:
            places = self._cut(caption_ids, self.max_length // 2)
        fixed = 2 + len(before) + len(places) + len(between) + len(end)
        if fixed > self.max_length:
            raise ValueError(
                f"prompt_template {self.prompt_template!r} with its pseudo-words is {fixed} tokens long, and the text "
                f"encoder reads {self.max_length}; name a shorter one"
            )
        text_ids = self._cut(text_ids, self.max_length - fixed)
        row = [self.tokenizer.bos_token_id, *before, *places, *between, *text_ids, *end, self.tokenizer.eos_token_id]
        return row, 1 + len(before)

    def _pieces(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text without start and end; strings of special tokens are read as ordinary text, and half a
        surrogate, as emoji cut in two leave it, as a question mark."""
        texts = [text.encode("utf-8", "replace").decode() for text in texts]
        return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids

    def _cut(self, ids: list[int], room: int) -> list[int]:
        if len(ids) <= room:
            return ids
        logger.warning_once(
            f"Some texts are longer than the text encoder reads and are cut to {self.max_length} tokens."
        )
        return ids[:room]

    def padded(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        """input_ids and attention_mask [B, L] of token ids, right-padded to the longest."""
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        return {
            "input_ids": torch.tensor([row + [pad] * (longest - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        }
