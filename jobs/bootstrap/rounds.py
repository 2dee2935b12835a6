"""The configs of a bootstrapping: those that its file names, each with the corpora and models of its round.

Round n makes the corpus PATH/round-n from the corpus before it, which is PATH/round-(n-1) or, in the first round, the
crawled one. All three of its models are trained on the corpus before it, as PATH/checkpoints/<stage>/round-n.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, TypeVar

from pipeline.config import load_config
from pipeline.storage.filesystem import filesystem_of, is_local
from schemas.bootstrap import BootstrapConfig
from schemas.config import CapfiltConfig
from schemas.errors import CapfiltError
from schemas.pretrain import CorpusSlice, PretrainConfig

C = TypeVar("C", CapfiltConfig, PretrainConfig)

Model = Literal["pretrain", "captioner", "filter"]
# The keys of [bootstrap] that name a training's recipe, and the stage that it has to have.
_STAGES: dict[Model, str] = {
    "pretrain": "blip-pretrain",
    "captioner": "blip-captioner",
    "filter": "blip-filter",
}
# The shape of a model, which captioner and filter have of the pretrained one. Not all of it shows in the weights.
_SHAPE = (
    *(f"vision.{key}" for key in ("layers", "width", "heads", "patch_px", "mlp_ratio")),
    *(
        f"text.{key}"
        for key in ("tokenizer", "layers", "width", "heads", "ffn_width", "vocab_size", "max_positions")
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """A bootstrapping's own config, and those that it names, checked against each other."""

    config: BootstrapConfig
    corpus: CapfiltConfig
    recipes: dict[Model, PretrainConfig]

    @property
    def count(self) -> int:
        """The rounds that were asked for."""
        return self.config.bootstrap.rounds

    def sources(self, kind: Literal["web", "human"]) -> tuple[str, ...]:
        """Return the names of the corpus's sources of a kind."""
        return tuple(source.name for source in self.corpus.source if source.kind == kind)

    def corpus_path(self, number: int) -> str:
        """Return where the corpus of a round is; of round 0, the crawled one."""
        return f"{self.config.bootstrap.path}/round-{number}" if number else self.corpus.corpus.path

    def model_folder(self, model: Model, number: int) -> str:
        """Return the folder of a round's model in the form that a corpus takes."""
        return (
            f"{self.config.bootstrap.models or f'{self.config.bootstrap.path}/models'}/round-{number}/{model}"
        )

    def run_folder(self, model: Model, number: int) -> str:
        """Return the folder of the training of a round's model."""
        return f"{self.config.bootstrap.path}/checkpoints/{_STAGES[model]}/round-{number}"

    def human_config(self) -> CapfiltConfig:
        """Return the config of the crawled corpus cut down to its human-captioned sources."""
        human = tuple(source for source in self.corpus.source if source.kind == "human")
        return self.corpus.model_copy(update={"source": human})

    def round_config(self, number: int) -> CapfiltConfig:
        """Return the config of a round's corpus: captioned and filtered by the models of the round."""
        models = {name: self.model_folder(name, number) for name in ("captioner", "filter")}
        assert self.corpus.filter is not None, "checked when the configs were read"
        return self.corpus.model_copy(
            update={
                "corpus": self.corpus.corpus.model_copy(update={"path": self.corpus_path(number)}),
                "caption": self.corpus.caption.model_copy(update={"model": models["captioner"]}),
                "filter": self.corpus.filter.model_copy(update={"model": models["filter"]}),
            }
        )

    def training(self, model: Model, number: int) -> PretrainConfig:
        """Return the config of the training of a round's model.

        The first model is pretrained on the web's own captions and on the human ones; a later one on what the round
        before curated. Captioner and filter begin with it, and read the human captions alone.
        """
        recipe, path = self.recipes[model], self.corpus_path(number - 1)
        run: dict[str, Any] = {
            "name": f"round-{number}",
            "output": f"{self.config.bootstrap.path}/checkpoints",
        }
        if model != "pretrain":
            run["init_from"] = self.run_folder("pretrain", number)
            slices = [CorpusSlice(path=path, sources=self.sources("human"))]
        elif number > 1:
            slices = [CorpusSlice(path=path)]
        else:
            slices = [
                CorpusSlice(path=path, sources=self.sources("web"), captions="web"),
                CorpusSlice(path=path, sources=self.sources("human")),
            ]
        corpora = tuple(_with_weights(part, recipe.data.corpus) for part in slices)
        return recipe.model_copy(
            update={
                "run": recipe.run.model_copy(update=run),
                "data": recipe.data.model_copy(update={"corpus": corpora}),
            }
        )


def _with_weights(part: CorpusSlice, of_recipe: Iterable[CorpusSlice]) -> CorpusSlice:
    """Return a slice with the recipe's mixing weights of its sources."""
    weights = {
        name: weight
        for given in of_recipe
        for name, weight in given.weights.items()
        if not part.sources or name in part.sources
    }
    return part.model_copy(update={"weights": weights})


def load_rounds(file: str, overrides: Sequence[str] = (), rounds: int | None = None) -> Rounds:
    """Read a bootstrapping's config and those that it names.

    Args:
        overrides: ``bootstrap.key=value``; behind ``corpus.``, ``pretrain.``, ``captioner.`` or ``filter.`` a key of
            that config: ``pretrain.optim.steps=100``.
        rounds: in place of ``bootstrap.rounds``.

    Raises:
        CapfiltError: a file is missing or wrong, or one does not fit the others.
    """
    own = [override for override in overrides if _config_of(override) is None]
    own += [f"bootstrap.rounds={rounds}"] if rounds is not None else []
    config = load_config(file, own, BootstrapConfig)

    def load(name: str, path: str, kind: type[C]) -> C:
        of_name = [override.partition(".")[2] for override in overrides if _config_of(override) == name]
        try:
            return load_config(path, of_name, kind)
        except CapfiltError as error:
            # As it was given.
            raise CapfiltError(str(error).replace("--set ", f"--set {name}.")) from error

    section = config.bootstrap
    recipes = {model: load(model, getattr(section, model), PretrainConfig) for model in _STAGES}
    loaded = Rounds(config=config, corpus=load("corpus", section.corpus, CapfiltConfig), recipes=recipes)
    if errors := [f"{file}: {error}" for error in _errors(loaded)]:
        raise CapfiltError("\n".join(errors))
    return loaded


def _config_of(override: str) -> str | None:
    """Return which of the named configs an override is of; None: of the bootstrapping's own."""
    name = override.partition(".")[0].strip()
    return name if name in ("corpus", *_STAGES) else None


def _errors(rounds: Rounds) -> Iterable[str]:
    """Yield what is wrong between the configs."""
    section, corpus = rounds.config.bootstrap, rounds.corpus
    where = f"bootstrap.corpus: {section.corpus}"
    for kind, use in (("web", "to caption and filter"), ("human", "to fine-tune captioner and filter on")):
        if kind not in {source.kind for source in corpus.source}:
            yield f'{where} has no [[source]] of kind = "{kind}", {use}'
    if corpus.filter is None:
        yield f"{where} has no section [filter]; add one"
    elif corpus.select.by == "clip":
        yield f'{where} has select.by = "clip", which does not ask the filter; set "itm" or "both"'
    for name, recipe in rounds.recipes.items():
        if recipe.run.stage != (stage := _STAGES[name]):
            yield (
                f"bootstrap.{name}: {getattr(section, name)} has run.stage = {recipe.run.stage!r}; a recipe of "
                f"{stage!r} is needed"
            )
        if key := recipe.probe_key:
            yield f"bootstrap.{name}: {getattr(section, name)} has {key}, and BLIP's models have no probe; leave it out"
    yield from _missing_beginnings(rounds)
    yield from _other_shape("captioner", rounds)
    yield from _other_shape("filter", rounds)
    for number in range(1, rounds.count + 1):
        if rounds.corpus_path(number) == corpus.corpus.path.rstrip("/"):
            yield f"{where} has the corpus.path of round {number}'s corpus; set another bootstrap.path"
    lengths: list[tuple[Model, str, int]] = [("captioner", "caption.max_length", corpus.caption.max_length)]
    lengths += [("filter", "filter.max_tokens", corpus.filter.max_tokens)] if corpus.filter else []
    for name, key, length in lengths:
        if (blip := rounds.recipes[name].blip) and length > (most := blip.text.max_positions):
            yield (
                f"{where} has {key} = {length}, and the model of {getattr(section, name)} ends at {most} tokens "
                "(blip.text.max_positions); set no more"
            )
    captioner = rounds.recipes["captioner"].blip
    if captioner and captioner.prompt != corpus.caption.prompt:
        yield (
            f"{where} has caption.prompt = {corpus.caption.prompt!r}, and the captioner learns blip.prompt = "
            f"{captioner.prompt!r}; make them equal"
        )
    if not is_local(filesystem_of(section.models or section.path)[0]):
        yield "bootstrap.models: exported models lie on this machine's disk or one that all nodes share; name a folder"


def _missing_beginnings(rounds: Rounds) -> Iterator[str]:
    """Yield the weights that the pretrained models begin with and that are not there."""
    recipe, file = rounds.recipes["pretrain"], rounds.config.bootstrap.pretrain
    names = {"run.init_from": recipe.run.init_from}
    if recipe.blip and not recipe.run.init_from:
        names |= {"blip.vision.init": recipe.blip.vision.init, "blip.text.init": recipe.blip.text.init}
    for key, name in names.items():
        # Ids of the hub and URLs are not looked up.
        if name.startswith("/") and not Path(name).exists():
            yield f"bootstrap.pretrain: {file} has {key} = {name!r}, and there is no such file or folder"


def _other_shape(model: Model, rounds: Rounds) -> Iterator[str]:
    """Yield the keys in which captioner or filter would be another model than the one that it begins with."""
    section = rounds.config.bootstrap
    blip, pretrained = rounds.recipes[model].blip, rounds.recipes["pretrain"].blip
    if blip is None or pretrained is None:
        return
    # ITC's projections, which a captioner does not have.
    keys = (*_SHAPE, "projection_width") if model == "filter" else _SHAPE
    for key in keys:
        value, begun = attrgetter(key)(blip), attrgetter(key)(pretrained)
        if value != begun:
            yield (
                f"bootstrap.{model}: {getattr(section, model)} has blip.{key} = {value!r}, and the model that it "
                f"begins with, of {section.pretrain}, has {begun!r}; make them equal"
            )
