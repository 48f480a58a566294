"""The Python API. It calls what the command line calls; errors that the caller can fix are those of :mod:`sodaops.errors`."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from sodaops import pipeline
from sodaops.bundle import layout
from sodaops.config.explain import explain
from sodaops.errors import ConfigError, DataError
from sodaops.io.progress import shown_log
from sodaops.pipeline import Run
from sodaops.registry import registry
from sodaops.registry.bundles import bundle_at, predictor_files, register_bundle
from sodaops.text.columns import names_of, text_of

if TYPE_CHECKING:
    from sodaops.config.schema import Config
    from sodaops.drift.result import DriftResult
    from sodaops.evaluation.result import Evaluated
    from sodaops.inference.table import PredictedTable
    from sodaops.registry.promotion import Promotion

Source = str | PathLike[str]


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Raises errors as the command line explains them, and shows the log if the application does not."""
    try:
        with shown_log():
            yield
    except Exception as error:
        explained = explain(error)
        if explained is None or explained is error:
            raise
        raise explained from error


def train(data: Any = None, *, overrides: Iterable[str] = (), **keywords: Any) -> Run:
    """Trains, exports and evaluates a model as ``sodaops train`` does; the same seed gives the same weights.

    Args:
        data: the path or address of a table; a DataFrame, Arrow table or rows as dictionaries, which are written to
            data/tables; or the name of a data set in conf/data. None: the default data set.
        overrides: of the configuration, as on the command line, such as ``["optim.warmup=0", "trainer=ddp"]``.
        keywords: short names of :data:`sodaops.config.keywords.KEYWORDS`, such as ``text`` and ``label`` for the columns.

    Raises:
        SodaOpsError: a problem that the caller can fix.
        KeyboardInterrupt: it was stopped; the same call with the run's ``run_dir`` and ``ckpt_path="last"`` resumes it.

    >>> rows = [{"review": f"number {i} is {label}", "stars": label} for i in range(60) for label in ("good", "bad")]
    >>> run = train(rows, text="review", label="stars", model="tiny", max_epochs=1, overrides=["evaluate.split=none"])
    >>> load(run.bundle).labels
    ['bad', 'good']
    """
    with _explained(), _own_hydra():
        from sodaops.config.compose import run_hydra
        from sodaops.config.keywords import as_overrides

        results = []

        def job(config: "Config") -> float | None:
            results.append(pipeline.train(config))
            return results[0].score

        words = as_overrides("train", keywords, overrides)
        run_hydra(job, [*_data_overrides(data, keywords.get("text"), keywords.get("label")), *words])
        return results[0]


def _data_overrides(data: Any, *columns: Any) -> list[str]:
    """The overrides that choose the data; a table in memory must have the given columns."""
    from sodaops.config.keywords import override
    from sodaops.config.schema import table_format

    if data is None:
        return []
    if not isinstance(data, str | PathLike):
        from sodaops.data.frames import write_table

        data = write_table(data, [name for names in columns if names is not None for name in names_of(names)])
    return ["data=csv", override("data.path", data)] if table_format(str(data)) else [override("data", data)]


@contextlib.contextmanager
def _own_hydra() -> Iterator[None]:
    """Leaves Hydra's state as it was, since the caller may be a Hydra application."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.singleton import Singleton

    instances = Singleton._instances
    outer = {kind: instances.pop(kind, None) for kind in (GlobalHydra, HydraConfig)}
    try:
        yield
    finally:
        for kind, instance in outer.items():
            instances.pop(kind, None)
            instances |= {kind: instance} if instance is not None else {}


class Model:
    """A bundle that predicts, without torch.

    >>> model = load("outputs/first")
    >>> model.labels
    ['negative', 'neutral', 'positive']
    >>> [prediction.label in model.labels for prediction in model.predict(["I love this", "the train is late again"])]
    [True, True]
    """

    def __init__(self, source: Source, variant: str | None = None) -> None:
        from sodaops.inference.predictor import Predictor

        self.bundle = registry.address_of(str(source))
        with bundle_at(self.bundle, predictor_files(variant)) as folder:
            self.predictor = Predictor(folder, variant)
        self.info, self.variant = self.predictor.info, self.predictor.variant
        self.labels = self.info.labels
        self.text_columns = self.info.text_columns

    def predict(self, texts: Any, text: str | Sequence[str] | None = None) -> Any:
        """Predicts texts.

        Args:
            texts: a list of texts; or a pandas Series; or a DataFrame. For a model that was trained on several text columns, a
                list of dictionaries from column to text, or a DataFrame.
            text: the DataFrame's column with the texts, or its columns; by default those that the model was trained on.

        Returns:
            For a list, a list of predictions, for labels with label, score and probs, for numbers with value, low and high.
            Else a DataFrame with columns of these names, of probs prob_LABEL, beside those of a DataFrame; they are empty for
            an empty text.

        Raises:
            DataError: an item that is no text or is empty, or no such column.
        """
        if hasattr(texts, "iloc"):
            return self._predict_pandas(texts, text)
        if isinstance(texts, str | Mapping):
            raise DataError(f"{str(texts)[:40]!r}: expected a list of texts; put it into a list.")
        return self.predictor.predict([text_of(item, self.text_columns, f"text {i}") for i, item in enumerate(texts, 1)])

    def _predict_pandas(self, data: Any, text: str | Sequence[str] | None) -> Any:
        import pyarrow as pa

        from sodaops.data import frames
        from sodaops.data.cells import as_text, join_texts
        from sodaops.inference.table import text_columns_of, with_predictions

        if not frames.is_frame(data):
            return self._predict_pandas(data.to_frame("text"), "text").drop(columns="text")
        columns, names = frames.named_columns(data), text_columns_of(self.info, text)
        for name in names:
            frames.check_column(name, columns, data)
        texts = join_texts([as_text(frames.to_array(name, columns[name])) for name in names]).fill_null("").to_pylist()
        probs = self.predictor.probs_of_cleaned([self.predictor.clean(one) for one in texts])
        rows = with_predictions(pa.table({own: pa.nulls(len(data)) for own in columns}), probs, self.predictor)
        added = {name: rows[name] for name in rows.column_names[len(columns) :]}
        return data.assign(
            **{name: of.to_pylist() if pa.types.is_list(of.type) else of.to_numpy() for name, of in added.items()}
        )

    def reason(self, prediction: Any) -> str | None:
        """Why the model abstains from a prediction; None: it does not, or has no thresholds (``evaluate.target_accuracy``)."""
        return self.predictor.reason(prediction)

    def label_set(self, prediction: Any) -> list[str]:
        """The label set of a prediction; empty without ``evaluate.set_coverage``."""
        return self.predictor.abstainer.label_set(prediction.probs) if self.predictor.abstainer else []

    def predict_file(
        self, path: Source, output: Source, text: str | Sequence[str] | None = None, abstain: bool = False
    ) -> "PredictedTable":
        """Predicts a table of any length; see :func:`sodaops.inference.table.predict_table`."""
        from sodaops.inference.table import bulk_predictor, predict_table

        with _explained():
            with bundle_at(self.bundle, predictor_files(self.variant)) as folder:
                predictor = bulk_predictor(folder, self.variant)
            return predict_table(predictor, str(path), text, str(output), abstain=abstain)


def load(bundle: Source, variant: str | None = None) -> Model:
    """Loads a bundle for prediction.

    Args:
        bundle: a bundle's or a run's folder, gs://BUCKET/FOLDER, or REGISTRY@ALIAS.
        variant: ``float32`` or ``int8``; None: int8 if it passed its check.

    Raises:
        BundleError, RegistryError, StorageError: no such bundle, or a damaged one.
    """
    with _explained():
        return Model(bundle, variant)


def evaluate(model: Model | Source, data: Any = None, *, overrides: Iterable[str] = (), **keywords: Any) -> "Evaluated":
    """Measures a model on all rows of a table, or without a table on the test split of its own data.

    Args:
        model: what :func:`load` returns or takes.
        data: as for :func:`train`. Repeated texts count once. The report is written to outputs/evaluation/NAME.
        overrides: of the configuration.
        keywords: as for :func:`train`; ``text`` and ``label`` are by default the columns of the training.

    Raises:
        SodaOpsError: a problem that the caller can fix.

    >>> rows = [{"text": "I love this", "sentiment": "positive"}, {"text": "it is late again", "sentiment": "negative"}]
    >>> evaluate("outputs/first", rows).metrics["n_rows"]
    2
    """
    with _explained():
        from sodaops.config.compose import compose
        from sodaops.config.keywords import as_overrides, override

        model = model if isinstance(model, Model) else load(model)
        words = as_overrides("evaluate", {"variant": model.variant, **keywords}, overrides)
        words.append(override("evaluate.bundle", model.bundle))
        if data is None:
            return pipeline.evaluate(compose(words))
        if "split" in keywords:
            raise ConfigError(f"split={keywords['split']!r}: all rows of a table are evaluated; leave it out.")
        config = compose([*_whole_table(model, data, keywords), *words])
        if model.info.task:
            config = config.model_copy(update={"task": model.info.task})
        pipeline.prepare(config)
        return pipeline.evaluate(config)


def _whole_table(model: Model, data: Any, keywords: Mapping[str, Any]) -> list[str]:
    """The overrides for an evaluation on all rows of a table, by the labels, the cleaning and the columns of a model."""
    from sodaops.config.keywords import override

    with bundle_at(model.bundle, lambda info: [layout.CONFIG]) as folder:
        config = layout.read_config(folder, model.info)
    trained = config["data"]
    settings = {key: trained.get(key) for key in ("text_column", "label_column", "label_map")}
    labels = None if model.predictor.task.question["kind"] == "number" else model.labels
    settings |= {"labels": labels, "cleaning": model.info.cleaning, "fractions": [0, 0, 1], "added": None}
    names = ("text",) if model.info.task else ("text", "label")  # other tasks may read other columns
    columns = [keywords.get(name, trained[f"{name}_column"]) for name in names]
    return [
        *_data_overrides(data, *columns),
        *(override(f"data.{key}", value) for key, value in settings.items()),
        # Older bundles have no task. Hydra takes no dictionary with any key, such as thresholds; the bundle's own follow.
        *(override(f"++task.{key}", of) for key, of in config.get("task", {}).items() if not isinstance(of, dict)),
        *(override(f"++loss.{key}", value) for key, value in config.get("loss", {}).items()),
        "checkpoint.monitor=val/loss",  # which every task has
        "evaluate.splits_dir=data/processed/${data.name}-evaluation",
        "evaluate.output_dir=outputs/evaluation/${data.name}",
        "evaluate.baselines=false",
    ]


def drift(model: Model | Source, request_log: Source, *, overrides: Iterable[str] = (), **keywords: Any) -> "DriftResult":
    """Compares logged requests with the texts that a model was trained on, and writes a report to ``output_dir``.

    Args:
        model: what :func:`load` returns or takes.
        request_log: the service's ``serve.request_log``.
        overrides: of the configuration.
        keywords: such as ``last``, ``since`` and ``until``.

    Raises:
        SodaOpsError: a problem that the caller can fix.
    """
    with _explained():
        from sodaops.config.compose import compose
        from sodaops.config.keywords import as_overrides
        from sodaops.drift.check import check_drift

        settings = compose(as_overrides("drift", keywords, overrides)).drift
        return check_drift(settings, model.bundle if isinstance(model, Model) else str(model), str(request_log))


class Registry(registry.Registry):
    """A registry with the gate. Its methods do what the commands do, also ``registry.wandb=true`` among ``overrides``.

    >>> models = Registry("outputs/registry")
    >>> models.register("outputs/first/bundle", "the first one") == models.version("challenger")
    True
    """

    def register(
        self, bundle_dir: Source, why: str = "", metrics: Mapping[str, Any] | None = None, overrides: Iterable[str] = ()
    ) -> str:
        """Adds a bundle, also of a run's folder or at gs://; see :meth:`sodaops.registry.registry.Registry.register`."""
        with self._copied(overrides, registry.CHALLENGER):
            return register_bundle(registry.Registry(self.root), str(bundle_dir), why, metrics)

    def promote(self, version: str, reason: str = "", force: bool = False, overrides: Iterable[str] = ()) -> "Promotion":
        """Makes a version or alias the champion if it passes the gate.

        Raises:
            RefusedError: it does not pass; nothing was changed.
            SodaOpsError: another problem that the caller can fix.
        """
        from sodaops.annotation.disagreements import judge_disagreements
        from sodaops.registry.promotion import promote

        with self._copied(overrides, registry.CHAMPION) as config:
            promotion = promote(config, version, reason, force, judge_disagreements)
            promotion.check()
            return promotion

    def roll_back(self, why: str, alias: str = registry.CHAMPION, overrides: Iterable[str] = ()) -> str:
        """Points an alias to its earlier version; see :meth:`sodaops.registry.registry.Registry.roll_back`."""
        with self._copied(overrides, alias):
            return super().roll_back(why, alias)

    @contextlib.contextmanager
    def _copied(self, overrides: Iterable[str], alias: str) -> Iterator["Config"]:
        """Copies the version that the block gives an alias to W&B, if the configuration says so."""
        with _explained():
            from sodaops.config.compose import compose
            from sodaops.config.keywords import as_overrides, override
            from sodaops.registry.mirror import mirror

            config = compose([*as_overrides("Registry", {}, overrides), override("registry.path", self.root)])
            yield config
            mirror(config, self, self.version(alias), [alias])
