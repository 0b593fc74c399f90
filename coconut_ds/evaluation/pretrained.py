"""A trained model as a transformers model: generate, forward, save and load, and answers as text.

    model = CoconutForCausalLM.from_pretrained("runs/gsm-coconut")
    model.generate(**model.tokenizer("3+4+2+7=?\\n", return_tensors="pt"))    ids, as in transformers
    model.answer_questions(["3+4+2+7=?"])                                     ["### 6"]

Importing this module registers the class with AutoConfig and AutoModelForCausalLM.

Shapes: B prompts, R returned sequences per prompt, T columns, K latents, V vocabulary.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache, StaticCache
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from coconut_ds.data.batching import NO_LABEL, Batch, collate, refuse_long_prompts
from coconut_ds.data.curriculum import Sample, prompt_only, render
from coconut_ds.data.problems import Problem, card_for
from coconut_ds.data.tokenizer import DATA_ONLY, START, Vocabulary, load_vocabulary, tokenize
from coconut_ds.errors import CheckpointError, ConfigError
from coconut_ds.evaluation.evaluate import max_new_tokens
from coconut_ds.evaluation.saved_models import (
    READING,
    Trained,
    described_model,
    find_one,
    portable_settings,
)
from coconut_ds.files import EXPORT_FILE
from coconut_ds.model.coconut import Coconut
from coconut_ds.model.loading import check_config, load_config
from coconut_ds.runs.checkpoints import refuse_non_finite
from coconut_ds.thoughts import Thought, ThoughtSettings, build_thought

# Caches that grow with the latents; the others need a fixed size or another loop.
CACHES = (None, "dynamic", "offloaded", "quantized")


class CoconutConfig(PreTrainedConfig):
    """The language model's configuration, the experiment's settings, its stage, and the special tokens."""

    model_type = "coconut"
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="gpt2")}

    text_config: dict | PreTrainedConfig | None = None
    experiment: dict | None = None  # keys of an experiment YAML
    stage: dict | None = None  # {"hidden_steps": ..., "num_latents": ...}
    start_token_id: int = -1
    latent_token_id: int = -1
    end_token_id: int = -1

    def __post_init__(self, **kwargs: Any) -> None:
        # The default of the outer configuration, None, would replace that of a built model.
        kwargs.setdefault("attn_implementation", getattr(self.text_config, "_attn_implementation", None))
        inner = self.text_config
        inner_type = (
            inner.get("model_type") if isinstance(inner, dict) else getattr(inner, "model_type", None)
        )
        if inner_type == self.model_type:
            raise ConfigError(
                f"text_config.model_type: {self.model_type!r} must be the language model's type, as 'gpt2'"
            )
        super().__post_init__(**kwargs)
        assert isinstance(self.text_config, PreTrainedConfig)
        self.tie_word_embeddings = getattr(self.text_config, "tie_word_embeddings", False)

    @classmethod
    def of(cls, trained: Trained, module: Coconut, vocabulary: Vocabulary) -> Self:
        config = cls(
            text_config=module.causal_lm.config,
            **portable_settings(trained, merged=True),
            start_token_id=vocabulary.start_id,
            latent_token_id=vocabulary.latent_id,
            end_token_id=vocabulary.end_id,
        )
        config.name_or_path = trained.experiment.model_id
        return config


class CoconutForCausalLM(PreTrainedModel, GenerationMixin):
    """A Coconut model for scripts, notebooks and programs that use transformers.

    `model` is the torch module, `trained` its settings and stage, `tokenizer` pads on the left.
    """

    config_class = CoconutConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _supports_sdpa = _supports_flash_attn = True
    config: CoconutConfig
    trained: Trained

    def __init__(self, config: CoconutConfig, module: Coconut | None = None) -> None:
        super().__init__(config)
        folder = config.name_or_path or (config.experiment or {}).get("model_id", "")
        self.trained = described_model({"experiment": config.experiment, "stage": config.stage}, Path(folder))
        if module is None:
            self.trained.refuse_more_latents_than(
                getattr(config.get_text_config(), "max_position_embeddings", None)
            )
            base = AutoModelForCausalLM.from_config(config.text_config, **DATA_ONLY)
            module = Coconut(base, self._new_thought(), READING).eval()
        else:
            for part in module.modules():  # post_init leaves trained weights as they are
                part._is_hf_initialized = True  # type: ignore[assignment]
        self.model = module
        tied = module.base.all_tied_weights_keys if isinstance(module.base, PreTrainedModel) else {}
        module.all_tied_weights_keys = {f"base.{a}": f"base.{b}" for a, b in tied.items()}  # type: ignore[assignment]
        self.post_init()

    @classmethod
    def of(cls, trained: Trained, device: str | torch.device | None = None) -> Self:
        """The model of a run, on `device`: default the first GPU, else the CPU."""
        vocabulary = load_vocabulary(trained.experiment.model_id, trained.experiment.chat_template)
        module = trained.build(vocabulary).to(device or _best_device())
        model = cls(CoconutConfig.of(trained, module, vocabulary), module).eval()
        model.trained, model.__dict__["vocabulary"] = trained, vocabulary
        model.generation_config = GenerationConfig(
            max_new_tokens=model.max_new_tokens,
            eos_token_id=vocabulary.eos_id,
            pad_token_id=vocabulary.pad_id,
            do_sample=False,
        )
        return model

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *args: Any, allow_pickle: bool = False, **kwargs: Any
    ) -> Any:
        """Load a folder of `save_pretrained` or `export`, a run folder or one of its checkpoints.

        A folder of `save_pretrained` (also on the hub) takes every option of transformers; the others take
        `device_map` (a device, or "auto": the first GPU, else the CPU) and `dtype`, by default fp32 on the
        CPU.  `allow_pickle`: also read pickled weights, which can run code of their author; the folder's own
        setting is ignored.
        Raises ConfigError and CheckpointError.
        """
        folder = Path(pretrained_model_name_or_path)
        if folder.exists() and (not (folder / "config.json").is_file() or (folder / EXPORT_FILE).is_file()):
            return cls._of_run(folder, allow_pickle, **kwargs)
        if (folder / "adapter_config.json").is_file():
            raise ConfigError(
                f"{folder}: adapter_config.json beside the merged weights of `save_pretrained` would load "
                "another model; delete adapter_config.json"
            )
        config = kwargs.pop("config", None) or load_config(str(folder))
        check_config(config, str(folder))
        if not isinstance(config, CoconutConfig):
            raise ConfigError(
                f"{folder} holds a {config.model_type} model without a thought; use AutoModelForCausalLM, "
                "or give a run folder, a checkpoint or a folder of `export`"
            )
        with_info = kwargs.pop("output_loading_info", False)
        kwargs |= {"config": config, "use_safetensors": True, "output_loading_info": True, **DATA_ONLY}
        read: Any = super().from_pretrained
        model, info = read(str(folder), *args, **kwargs)
        if wrong := [*info["missing_keys"], *info["unexpected_keys"]]:
            raise CheckpointError(
                f"{folder}: weights are missing or unexpected: {', '.join(sorted(wrong)[:8])}"
            )
        refuse_non_finite(dict(model.named_parameters()), folder)
        return (model, info) if with_info else model

    @classmethod
    def _of_run(
        cls, folder: Path, allow_pickle: bool, device_map: Any = "cpu", dtype: Any = None, **others: Any
    ) -> Self:
        if others:
            raise ConfigError(
                f"from_pretrained: {sorted(others)[0]!r} is not an option for {folder}; save the model with "
                "`save_pretrained` first, and load that folder"
            )
        trained = find_one(str(folder), overrides=["allow_pickle=true"] if allow_pickle else [])
        model = cls.of(trained, _best_device() if device_map in (None, "auto") else device_map)
        return model if dtype in (None, "auto") else model.to(dtype)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Write config.json, model.safetensors and the tokenizer; adapters are merged into the weights."""
        plain = self
        if not isinstance(self.model.base, PreTrainedModel):
            from coconut_ds.model.lora import merge  # imports PEFT

            plain = type(self)(self.config, Coconut(merge(self.model), self.model.thought, READING))
            plain.generation_config = self.generation_config
        super(CoconutForCausalLM, plain).save_pretrained(save_directory, *args, **kwargs)
        self.vocabulary.tokenizer.save_pretrained(save_directory)

    def _new_thought(self) -> Thought:
        experiment = self.trained.experiment
        hidden_size = self.config.get_text_config().hidden_size
        return build_thought(experiment.thought, hidden_size, ThoughtSettings.of(experiment))

    def _init_weights(self, module: nn.Module) -> None:
        """Compute the thought's buffers that no file has.  Its parameters initialize themselves."""
        if isinstance(module, Thought):
            buffers = dict(self._new_thought().named_buffers())
            for name in module._non_persistent_buffers_set:
                module.get_buffer(name).copy_(buffers[name])

    @cached_property
    def vocabulary(self) -> Vocabulary:
        experiment = self.trained.experiment
        return load_vocabulary(experiment.model_id, experiment.chat_template)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, set up for `generate`: a batch is padded on the left.

        The text of a special token stays text, as in training data.
        """
        tokenizer: Any = copy.deepcopy(self.vocabulary.tokenizer)
        tokenizer.padding_side = "left"
        tokenizer.split_special_tokens = True
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        in_generate: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] of token ids [B, T]; latent tokens are replaced by thoughts.

        `labels` (-100: none) are unshifted, and the loss is their mean, as in transformers.
        `position_ids`: default those of the mask.  `add_latents` puts latent slots behind a prompt.  Given a
        cache, a prompt with latents has logits for its last column only.  `in_generate`: latent tokens behind
        cached columns are generated text, and lengths are checked already.
        Raises ValueError for latents that begin in different columns or come behind cached columns, and for
        columns beyond the model's positions.
        """
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if attention_mask is None:
            attention_mask = input_ids.new_ones(len(input_ids), past + input_ids.shape[1])
        positions_BT = self._positions(input_ids, attention_mask[:, past:], attention_mask, position_ids)
        if not in_generate:
            self._refuse_columns(input_ids, attention_mask[:, past:], positions_BT, past)
        batch = None if past else self._batch(input_ids, attention_mask, positions_BT, labels)
        if batch is not None and batch.num_latents:
            if isinstance(past_key_values, StaticCache):
                raise ValueError("past_key_values: latents need a cache that grows; use DynamicCache()")
            if past_key_values is None:
                hidden_BTD = self.model.hidden_states(batch)
            else:
                hidden_BTD = self.model.read_prompts(batch, past_key_values)[0][:, None]  # type: ignore[arg-type]
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.model.head(hidden_BTD[:, kept])
            loss = None
            if labels is not None:
                loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1], **kwargs)
            return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        return self.model.causal_lm(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions_BT,
            labels=labels,
            past_key_values=past_key_values,
            use_cache=bool(use_cache),
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def _positions(
        self, ids_BT: Tensor, real_BT: Tensor, mask_BT: Tensor, position_ids: Tensor | None
    ) -> Tensor:
        """The given positions or those of the mask, of the columns `real_BT` that follow the cached ones."""
        if position_ids is None:
            return (mask_BT.cumsum(1) - 1)[:, -real_BT.shape[1] :].clamp(min=0)
        if position_ids.shape[-1] != ids_BT.shape[1] or position_ids.dim() > 2:
            raise ValueError(
                f"position_ids has the shape {[*position_ids.shape]}, and input_ids {[*ids_BT.shape]}: give "
                "one position per token, or leave position_ids out"
            )
        return position_ids.expand_as(ids_BT)

    def _refuse_columns(self, ids_BT: Tensor, real_BT: Tensor, positions_BT: Tensor, past: int) -> None:
        """Raise ValueError for positions that the model does not have and for latents behind a cache."""
        positions_BT = positions_BT[real_BT.bool()]
        if positions_BT.numel():
            least, most = int(positions_BT.min()), int(positions_BT.max())
            limit = self.model.num_positions
            if least < 0 or (limit is not None and most >= limit):
                raise ValueError(
                    f"input_ids: positions {least} to {most}, and the model has positions 0 to "
                    f"{'any' if limit is None else limit - 1}; shorten the rows"
                )
        if past and bool((ids_BT == self.config.latent_token_id).any()):
            raise ValueError(
                f"input_ids has latent tokens behind {past} cached columns, and thoughts need the hidden "
                "states of all columns; give the prompt with its latents in one call"
            )

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """The inputs of one pass of `generate`: finished rows may run past the model's last position."""
        prepare: Any = super().prepare_inputs_for_generation  # type: ignore[misc]
        inputs = prepare(*args, **kwargs)
        if self.model.num_positions is not None and inputs.get("position_ids") is not None:
            inputs["position_ids"] = inputs["position_ids"].clamp(max=self.model.num_positions - 1)
        return inputs | {"in_generate": True}

    def _batch(
        self, ids_BT: Tensor, mask_BT: Tensor, positions_BT: Tensor, labels_BT: Tensor | None
    ) -> Batch:
        """The latent slots are those behind a row's <start>; any other latent token is text."""
        starts_BT = ids_BT == self.config.start_token_id
        first_B = starts_BT.int().argmax(1)[starts_BT.any(1)] + 1
        first = int(first_B.max()) if len(first_B) else ids_BT.shape[1]
        if bool((first_B != first).any()):
            raise ValueError("input_ids: the latents of all rows must begin in one column; pad on the left")
        latents_BT = (ids_BT[:, first:] == self.config.latent_token_id).long().cumprod(1)
        num_latents_B = latents_BT.sum(1) * starts_BT.any(1)
        labels_BT = torch.full_like(ids_BT, NO_LABEL) if labels_BT is None else labels_BT
        batch = Batch.from_padded(ids_BT, mask_BT, positions_BT, labels_BT, latent_id=-1)
        num_latents = int(num_latents_B.max())
        return replace(batch, latents_per_row_B=num_latents_B, num_latents=num_latents, first_latent=first)

    def add_latents(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, num_latents: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Append <start>, `num_latents` latents and <end> to prompts padded on the left.

        input_ids, attention_mask: [B, T] -> [B, T + num_latents + 2].  Default: as many latents as the model
        was trained with at last.  Ids with a start token and methods without latents stay unchanged.
        Raises ValueError for prompts padded on the right, and if only some rows have a start token.
        """
        trained = self.trained.with_latents(num_latents)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
            if len(input_ids) > 1 and bool((input_ids == self.vocabulary.pad_id).any()):
                raise ValueError("input_ids has padding: pass the tokenizer's attention_mask too")
        if not bool(attention_mask[:, -1].all()):
            raise ValueError(
                "the prompts are padded on the right; use model.tokenizer, or padding_side='left'"
            )
        ids = self.config
        has_start = (input_ids == ids.start_token_id).any(1).tolist()
        if any(has_start) and not all(has_start):
            raise ValueError(
                f"input_ids: row {has_start.index(True)} has the token {START} and row "
                f"{has_start.index(False)} has not; tokenize text with model.tokenizer, which keeps special "
                "tokens in a text as text, or add the latents to all rows"
            )
        if not trained.experiment.method.has_latents or all(has_start):
            return input_ids, attention_mask
        slots = [ids.start_token_id, *[ids.latent_token_id] * trained.stage.num_latents, ids.end_token_id]
        slots_BK = torch.tensor(slots, device=input_ids.device).expand(len(input_ids), -1)
        return torch.cat([input_ids, slots_BK], 1), torch.cat([attention_mask, torch.ones_like(slots_BK)], 1)

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Any = None,
        stopping_criteria: Sequence[StoppingCriteria] | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        num_latents: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue prompts [B, T], padded on the left, as in transformers: ids [B R, T + new tokens].

        Latents are inserted behind each prompt for the model and are not part of the returned ids; `forward`
        and processors see them.  `num_latents`: default as many as the model was trained with at last.
        Every option of transformers is taken; by default answers are greedy, up to the length of the run's
        evaluation.  A row also ends when its positions are used up.
        Raises DataError for a longer prompt, and ValueError for options that do not work with latents.
        """
        prompts_BT = inputs if input_ids is None else input_ids
        if prompts_BT is None:
            raise ValueError("generate needs input_ids: model.tokenizer(text, return_tensors='pt')")
        for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            if (length := kwargs.pop(total, None)) is not None:  # counted without latents
                kwargs.setdefault(new, max(length - prompts_BT.shape[1], 0))
        ids_BT, mask_BT = self.add_latents(prompts_BT, attention_mask, num_latents)
        refuse_long_prompts(mask_BT.sum(1).tolist(), self.model.num_positions, "prompt")
        if bool((ids_BT == self.config.latent_token_id).any()):
            _refuse_options(vars(generation_config or self.generation_config) | kwargs)
        stop = StoppingCriteriaList(stopping_criteria or [])
        if self.model.num_positions is not None:
            stop.append(PositionsUsed(self.model.num_positions, mask_BT))
        run: Any = super().generate  # type: ignore[misc]
        output = run(ids_BT, generation_config, logits_processor, stop, attention_mask=mask_BT, **kwargs)
        sequences = output if isinstance(output, Tensor) else output.sequences
        answers = sequences[:, ids_BT.shape[1] :]
        sequences = torch.cat([prompts_BT.repeat_interleave(len(answers) // len(ids_BT), 0), answers], 1)
        if isinstance(output, Tensor):
            return sequences
        output.sequences = sequences
        return output

    @property
    def max_new_tokens(self) -> int:
        """The limit used in evaluation."""
        return max_new_tokens(self.trained.experiment, card_for(self.trained.experiment.val_path))

    def answer_questions(
        self,
        questions: str | Sequence[str],
        num_latents: int | None = None,
        max_new_tokens: int | None = None,
        batch_size: int = 32,
    ) -> Any:
        """Greedy answers as in evaluation, without the question: a text for a text, a list for a list.

        `num_latents`: default as many as the model was trained with at last.
        Raises DataError for a question longer than the model.
        """
        if isinstance(questions, str):
            return self.answer_questions([questions], num_latents, max_new_tokens)[0]
        texts: list[str] = []
        limit = self._limit(max_new_tokens)
        samples = self.samples(questions, num_latents)
        for start in range(0, len(samples), batch_size):
            batch = self._collated(samples[start : start + batch_size])
            texts += map(self.vocabulary.decode, self.model.generate(batch, limit, self.vocabulary.eos_id))
        return texts

    def stream_answer(
        self, question: str, num_latents: int | None = None, max_new_tokens: int | None = None
    ) -> Iterator[str]:
        """The answer to one question, streamed in pieces."""
        ids: list[int] = []
        shown = ""
        batch = self.prompts([question], num_latents)
        for tokens in self.model.stream(batch, self._limit(max_new_tokens), self.vocabulary.eos_id):
            ids += tokens.values()
            text = self.vocabulary.decode(ids)
            # An incomplete character of several tokens decodes to the replacement character.
            if not text.endswith("\N{REPLACEMENT CHARACTER}") and text != shown:
                yield text[len(shown) :]
                shown = text
        if (text := self.vocabulary.decode(ids)) != shown:
            yield text[len(shown) :]

    def prompts(self, questions: Sequence[str], num_latents: int | None = None) -> Batch:
        """The batch of these questions.  Raises DataError for a question longer than the model."""
        return self._collated(self.samples(questions, num_latents))

    def samples(self, questions: Sequence[str], num_latents: int | None = None) -> list[Sample]:
        """The prompt of each question.  Raises DataError for a question longer than the model."""
        trained = self.trained.with_latents(num_latents)
        # The number of steps of a new question is unknown, so it gets all slots.
        experiment = replace(trained.experiment, pad_latent_to_max=True)
        problems = tokenize([Problem(question, (), "") for question in questions], self.vocabulary)
        samples = [
            prompt_only(render(problem, trained.stage, experiment, self.vocabulary, index))
            for index, problem in enumerate(problems)
        ]
        lengths = [len(sample.tokens) for sample in samples]
        refuse_long_prompts(lengths, self.model.num_positions, "question")
        return samples

    def _collated(self, samples: Sequence[Sample]) -> Batch:
        return collate(samples, self.vocabulary.pad_id).to(self.device)

    def _limit(self, limit: int | None) -> int:
        if limit is not None and limit < 1:
            raise ConfigError(f"max_new_tokens {limit}: must be 1 or more")
        return self.max_new_tokens if limit is None else limit


class PositionsUsed(StoppingCriteria):
    """Ends a row when the model has no position for another token; the last token is never read."""

    def __init__(self, num_positions: int, mask_BT: Tensor) -> None:
        self.last_column_B = mask_BT.shape[1] + num_positions - mask_BT.sum(1) + 1

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        rows = len(input_ids) // len(self.last_column_B)
        return input_ids.shape[1] >= self.last_column_B.repeat_interleave(rows)


def _refuse_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError for options of `generate` that would read latents as text, or fail."""
    if (cache := options.get("cache_implementation")) not in CACHES:
        raise ValueError(f"cache_implementation {cache!r} does not work with latents; leave it out")
    for name in ("prefill_chunk_size", "assistant_model"):
        if options.get(name) is not None:
            raise ValueError(f"{name} does not work with latents; leave it out")
    if (given := options.get("past_key_values")) is not None and (
        isinstance(given, StaticCache) or given.get_seq_length()
    ):
        raise ValueError("past_key_values: a prompt with latents needs an empty DynamicCache(), or none")


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


AutoConfig.register(CoconutConfig.model_type, CoconutConfig, exist_ok=True)
AutoModelForCausalLM.register(CoconutConfig, CoconutForCausalLM, exist_ok=True)
# pipeline("text-generation") looks up names here, which `register` does not add (transformers 5.23).
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[CoconutConfig.model_type] = CoconutForCausalLM.__name__
