"""Adapter that presents a ``Model`` as a model of EleutherAI's lm-evaluation-harness.

Requests are tokenised as in the harness's own transformers backend (``HFLM`` of lm_eval 0.4.13), so that scores can be
compared with published ones. Importing this file requires ``lm_eval``.
"""

import bisect
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from spap_jax.data.tokens import load_tokenizer
from spap_jax.errors import UserError
from spap_jax.evaluation.generation import end_tokens
from spap_jax.evaluation.perplexity import check_finite
from spap_jax.evaluation.sequences import continuations, log_likelihoods
from spap_jax.models.model import Model
from spap_jax.parallel.placement import shard_params

Watch = Callable[[str, int, int], None]
"""Progress callback; its arguments are the kind of request, the number of requests done, and the total."""

NEW_TOKENS = 256
"""Number of tokens to generate if a task sets no limit, as in the harness."""


class HarnessModel(TemplateLM):
    """A model for ``lm_eval.simple_evaluate(model=...)``."""

    def __init__(
        self,
        model: Model,
        *,
        tokenizer: str | Path | None = None,
        batch_tokens: int = 4096,
        watch: Watch = lambda kind, done, total: None,
    ) -> None:
        """Puts the model on the devices of the mesh around it.

        Args:
            tokenizer: A model folder or a hub id. By default the model's own folder.

        Raises:
            UserError: the tokenizer cannot be loaded, or has no token to begin a text with.
        """
        super().__init__()
        self.tokenizer: Any = load_tokenizer(tokenizer or model.source.folder or model.source.name)
        if self.prefix_token_id is None:
            raise UserError(
                f"the tokenizer of {model.source.name} names neither a beginning nor an end token, and one of them has "
                "to stand before a text: add bos_token or eos_token to its tokenizer_config.json."
            )
        self._model = model.replace(params=shard_params(model.config, model.params))
        self._ends = {*end_tokens(model), self.eot_token_id}
        self._batch_tokens, self._watch, self._name = batch_tokens, watch, model.source.name

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token placed before a text without context: the beginning token, or else the end token."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """Maximum number of tokens that the model reads at once: its positions."""
        return self._model.config.positions

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Returns token ids; by default with the tokenizer's special tokens, unless the text begins with them."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Returns the log-likelihood of each continuation given its context, and whether it is the greedy one."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Returns the log-likelihood of each text, in windows of the model's length; the first has the prefix token."""
        windows = []
        for request in requests:
            tokens = self.tok_encode(str(request.args[0]))
            rolling = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            windows.append([*map(make_disjoint_window, rolling)])
        pairs = [(("", ""), *window) for text in windows for window in text]
        values = iter(value for value, _ in self._loglikelihood_tokens(pairs, what="log-likelihoods of texts"))
        return [sum(islice(values, len(text))) for text in windows]

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        what: str = "log-likelihoods",
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Scores continuations; a context that is too long for the model is truncated on the left."""
        if not requests:  # all texts are empty
            return []
        sequences = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in requests]
        predicted = [len(continuation) for _, _, continuation in requests]
        if max(predicted) > self.max_length:
            raise UserError(
                f"a task asks for the likelihood of {max(predicted)} tokens at once, which do not fit the model's "
                f"{self.max_length} positions: leave that task out."
            )
        scores = {}
        self._watch(what, 0, len(requests))
        for batch in log_likelihoods(self._model, sequences, predicted, self._batch_tokens):
            for score, _ in batch.values():
                check_finite(score, self._name, "log-likelihood of a text")
            scores |= batch
            self._watch(what, len(scores), len(requests))
        return [scores[index] for index in range(len(requests))]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Generates the likeliest text after each context, up to the first stop sequence."""
        arguments: list[Any] = [request.args for request in requests]
        by_settings: dict[str, list[int]] = {}
        for index, (_, settings) in enumerate(arguments):
            by_settings.setdefault(repr(settings), []).append(index)
        texts: dict[int, str] = {}
        self._watch("texts", 0, len(requests))
        for members in by_settings.values():
            for batch in self._texts([arguments[member][0] for member in members], arguments[members[0]][1]):
                texts |= {members[index]: text for index, text in batch.items()}
                self._watch("texts", len(texts), len(requests))
        return [texts[index] for index in range(len(requests))]

    def _texts(self, contexts: list[str], settings: dict[str, Any]) -> Iterator[dict[int, str]]:
        """Generates the texts of requests with the same settings, one batch at a time."""
        known: dict[str, Any] = dict(normalize_gen_kwargs(settings, NEW_TOKENS))
        stops = [stop for stop in handle_stop_sequences(known.pop("until"), eos=self.tokenizer.eos_token) if stop]
        new = known.pop("max_gen_toks")
        if not known["do_sample"]:
            for without_effect in ("do_sample", "temperature", "top_k", "top_p"):
                known.pop(without_effect, None)
        if known:
            raise UserError(
                f"a task generates with {', '.join(known)}, which is not supported: leave that task out, or set no "
                "more than until and max_gen_toks in it."
            )
        if new >= self.max_length:
            raise UserError(
                f"a task asks for texts of up to {new} tokens, which leave no room for a context in the model's "
                f"{self.max_length} positions: leave that task out."
            )
        room = self.max_length - new
        prompts = [(self.tok_encode(context) or [self.prefix_token_id])[-room:] for context in contexts]

        def ended(tokens: list[int]) -> bool:
            text = self.tokenizer.decode(tokens)
            return not self._ends.isdisjoint(tokens) or any(stop in text for stop in stops)

        for batch in continuations(self._model, prompts, new, ended, self._batch_tokens):
            yield {index: self._text(tokens, ended, stops) for index, tokens in batch.items()}

    def _text(self, tokens: list[int], ended: Callable[[list[int]], bool], stops: list[str]) -> str:
        """Decodes tokens up to the end of the text; special tokens can end it, but are not part of it."""
        length = bisect.bisect_left(range(len(tokens)), True, key=lambda last: ended(tokens[: last + 1])) + 1
        text = self.tokenizer.decode(tokens[:length], skip_special_tokens=True)
        return postprocess_generated_text(text, stop=stops, think_end_token=None)
