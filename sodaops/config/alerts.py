"""Alert rules and their receivers: the typed form of conf/alerts."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from sodaops.config.sections import Count, Finite, Positive, Section
from sodaops.errors import nearest

MetricsUrl = Annotated[str, Field(pattern=r"^https?://[^\s/@?#]+(/[^\s@?#]*)?$")]  # no credentials in it
Address = Annotated[str, Field(pattern=r"^[^\s@<>,;]+@[^\s@<>,;]+$")]
PREDICT = "/predict.*|/v2/.*/infer"  # regular expression of the paths whose requests count
RuleName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class AlertRule(Section):
    """When an alert on a signal fires, and when it recovers."""

    signal: Literal[
        "drift", "error_rate", "latency_p99_s", "mean_confidence", "accuracy", "macro_f1", "traffic", "log_lost", "up"
    ]
    above: Finite | None = Field(None, description="fires above this value")
    below: Finite | None = Field(None, description="fires below this value", validate_default=True)
    clear: Finite = Field(description="a firing alert recovers at this value; equal to the threshold: no hysteresis")
    for_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(description="how long the threshold must be exceeded")
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
    def _can_be_reached(cls, value: float | None, info: ValidationInfo) -> float | None:
        """Exactly one threshold, and one that the signal can pass."""
        signal, side = info.data.get("signal"), info.field_name
        if side == "below" and "above" in info.data and (value is None) == (info.data["above"] is None):
            raise _refused("expected one of above and below, and not both")
        is_share = signal in ("drift", "error_rate", "mean_confidence", "accuracy", "macro_f1", "up")
        if value is not None and side == "above" and (value < 0 or (is_share and value >= 1)):
            raise _refused(f"expected 0 or more{' and less than 1' if is_share else ''}, the range of {signal}")
        if value is not None and side == "below" and (value <= 0 or (is_share and value > 1)):
            raise _refused(f"expected more than 0{' and at most 1' if is_share else ''}, the range of {signal}")
        return value

    @field_validator("clear")
    @classmethod
    def _within_threshold(cls, value: float, info: ValidationInfo) -> float:
        above, below = info.data.get("above"), info.data.get("below")
        if above is not None and value > above:
            raise _refused(f"expected at most above={above:g}, where the rule fires")
        if below is not None and value < below:
            raise _refused(f"expected at least below={below:g}, where the rule fires")
        return value

    @property
    def threshold(self) -> float:
        """The value of ``above`` or ``below``, whichever is given."""
        return next(limit for limit in (self.above, self.below) if limit is not None)

    @property
    def limit(self) -> str:
        """The threshold in words: ``above 0.02``."""
        return f"{'below' if self.above is None else 'above'} {self.threshold:g}"

    def fires(self, value: float) -> bool:
        """Whether a value of the signal exceeds the threshold."""
        return value > self.threshold if self.above is not None else value < self.threshold


class EmailConfig(Section):
    """The mail server that Alertmanager sends through."""

    host: str
    port: Annotated[int, Field(ge=1, le=65535)]
    sender: Address
    recipients: list[Address] = Field(min_length=1)
    starttls: bool
    username: str | None = None
    password_file: str | None = Field(
        None, description="file with the password, on Alertmanager's machine", validate_default=True
    )

    @field_validator("password_file")
    @classmethod
    def _login_is_complete_and_encrypted(cls, value: str | None, info: ValidationInfo) -> str | None:
        if "username" in info.data and (value is None) != (info.data["username"] is None):
            raise _refused("expected both username and password_file, or neither")
        if value is not None and info.data.get("starttls") is False:
            raise _refused("expected starttls=true with a password, which would be sent unencrypted otherwise")
        return value


class AlertsConfig(Section):
    """Alert rules, and who is notified (conf/alerts)."""

    metrics_urls: list[MetricsUrl] = Field(min_length=1, description="read by `sodaops alerts check`")
    every_s: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(description="how often rules are evaluated")
    window_s: Annotated[float, Field(allow_inf_nan=False)]
    traffic_offset_s: Annotated[float, Field(allow_inf_nan=False)] = Field(description="traffic is compared with this long ago")
    traffic_min_requests: Count
    cooldown_s: Positive
    webhook_url_file: str | None
    runbook_url: MetricsUrl | None = Field(None, description="where docs/incidents.md is published; alerts link to its #RULE")
    email: EmailConfig | None
    rules: dict[RuleName, AlertRule | None] = Field(description="null disables a rule")

    def enabled_rules(self) -> dict[str, AlertRule]:
        """The rules that are not null."""
        return {name: rule for name, rule in self.rules.items() if rule is not None}

    def runbook(self, rule: str) -> str:
        """URL of the rule's section in the runbook; empty without ``runbook_url``."""
        return f"{self.runbook_url}#{rule}" if self.runbook_url else ""

    @field_validator("window_s", "traffic_offset_s")
    @classmethod
    def _long_enough(cls, value: float, info: ValidationInfo) -> float:
        every_s, window_s = info.data.get("every_s"), info.data.get("window_s")
        if info.field_name == "window_s" and every_s is not None and value < 2 * every_s:
            raise _refused(f"expected at least twice every_s={every_s:g}, since a rate needs two scrapes")
        if info.field_name == "traffic_offset_s" and window_s is not None and value < window_s:
            raise _refused(f"expected at least window_s={window_s:g}, so that the two windows do not overlap")
        return value


def _refused(message: str, **context: str) -> PydanticCustomError:
    return PydanticCustomError("refused", message, context)
