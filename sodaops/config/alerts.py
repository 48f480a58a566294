"""What is watched and who is told: the typed form of conf/alerts."""

from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from sodaops.config.sections import Count, Finite, Positive, Section
from sodaops.errors import nearest

MetricsUrl = Annotated[str, Field(pattern=r"^https?://[^\s/@?#]+(/[^\s@?#]*)?$")]  # no credentials in it
RuleName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class AlertRule(Section):
    """When a signal is an alarm, and when no longer."""

    signal: Literal["drift", "error_rate", "latency_p99_s", "mean_confidence", "traffic", "log_lost", "up"]
    above: Finite | None = Field(None, description="fires past this")
    below: Finite | None = Field(None, description="fires under this", validate_default=True)
    clear: Finite = Field(description="recovers here; above or below itself: no hysteresis")
    for_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(description="how long before it fires")
    severity: Literal["page", "ticket"]
    summary: str

    @model_validator(mode="before")
    @classmethod
    def _known(cls, rule: Any) -> Any:
        unknown = [key for key in rule if key not in cls.model_fields] if isinstance(rule, dict) else []
        if unknown:
            hint, keys = nearest(unknown[0], cls.model_fields), ", ".join(cls.model_fields)
            raise _refused("{fault}", fault=f"{unknown[0]} is not a key{hint}; a rule has: {keys}")
        return rule

    @field_validator("above", "below")
    @classmethod
    def _can_fire(cls, value: float | None, info: ValidationInfo) -> float | None:
        seen, signal = info.data, info.data.get("signal")
        if info.field_name == "below" and "above" in seen and (value is None) == (seen["above"] is None):
            raise _refused("expected one of above and below, and not both")
        share = signal in ("drift", "error_rate", "mean_confidence", "up")
        if value is not None and info.field_name == "above" and (value < 0 or (share and value >= 1)):
            raise _refused(f"expected 0 or more{' and less than 1' if share else ''}, since {signal} is never elsewhere")
        if value is not None and info.field_name == "below" and (value <= 0 or (share and value > 1)):
            raise _refused(f"expected more than 0{' and at most 1' if share else ''}, since {signal} is never elsewhere")
        return value

    @field_validator("clear")
    @classmethod
    def _on_the_good_side(cls, value: float, info: ValidationInfo) -> float:
        above, below = info.data.get("above"), info.data.get("below")
        if above is not None and value > above:
            raise _refused(f"expected at most above={above:g}, where the rule fires")
        if below is not None and value < below:
            raise _refused(f"expected at least below={below:g}, where the rule fires")
        return value

    @property
    def threshold(self) -> float:
        """Of the side that is given."""
        return next(limit for limit in (self.above, self.below) if limit is not None)

    @property
    def limit(self) -> str:
        """The threshold in words: ``above 0.02``."""
        return f"{'below' if self.above is None else 'above'} {self.threshold:g}"

    def fires(self, value: float) -> bool:
        """Whether a value of the signal is past the threshold."""
        return value > self.threshold if self.above is not None else value < self.threshold

    def clears(self, value: float) -> bool:
        """Whether a value of the signal ends an alarm."""
        return value <= self.clear if self.above is not None else value >= self.clear


class EmailConfig(Section):
    """A mail server; its user and password come from SODAOPS_SMTP_USER and SODAOPS_SMTP_PASSWORD alone."""

    host: str
    port: Annotated[int, Field(ge=1, le=65535)]
    sender: str
    recipients: list[str] = Field(min_length=1)
    starttls: bool


class AlertsConfig(Section):
    """What is watched, and who is told (conf/alerts)."""

    metrics_urls: list[MetricsUrl] = Field(min_length=1)
    every_s: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    window_s: Annotated[float, Field(allow_inf_nan=False)] = Field(description="over which rates are taken")
    traffic_offset_s: Annotated[float, Field(allow_inf_nan=False)] = Field(description="how long ago traffic is compared with")
    traffic_min_requests: Count = Field(description="in the window then; with fewer, traffic has no value")
    cooldown_s: Positive = Field(description="a firing rule is not sent again sooner")
    state_dir: str
    webhook_url: SecretStr | None = Field(description="SODAOPS_ALERT_WEBHOOK goes before it")
    runbook_url: MetricsUrl | None = Field(None, description="where docs/incidents.md is published; messages link to its #RULE")
    email: EmailConfig | None
    max_outbox: Count = Field(description="notifications kept for each sink that cannot be reached")
    max_retry_s: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(description="longest wait between two tries")
    rules: dict[RuleName, AlertRule | None] = Field(description="null: out of force")

    def runbook(self, rule: str) -> str:
        """The address of what to do about a rule; empty where none is configured."""
        return f"{self.runbook_url}#{rule}" if self.runbook_url else ""

    @field_validator("window_s", "traffic_offset_s")
    @classmethod
    def _long_enough(cls, value: float, info: ValidationInfo) -> float:
        every_s, window_s = info.data.get("every_s"), info.data.get("window_s")
        if info.field_name == "window_s" and every_s is not None and value < 2 * every_s:
            raise _refused(f"expected at least twice every_s={every_s:g}, since a rate needs two scrapes")
        if info.field_name == "traffic_offset_s" and window_s is not None and value < window_s:
            raise _refused(f"expected at least window_s={window_s:g}, so that the two windows lie apart")
        return value


def _refused(said: str, **context: str) -> PydanticCustomError:
    return PydanticCustomError("refused", said, context)
