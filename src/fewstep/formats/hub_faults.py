"""Why something could not be fetched from the hub, in a few words: its client says it in many lines, or of its own code."""

from fewstep.errors import first_line

_REASONS = {
    "GatedRepoError": "it is gated: accept its terms on the hub, then log in with `hf auth login`",
    "RepositoryNotFoundError": "the hub has no such model, or it is a private one",
    "RevisionNotFoundError": "the hub has no such revision of it",
    "OfflineModeIsEnabled": "the hub is switched off by HF_HUB_OFFLINE, and it is not in the cache",
    "ConnectError": "the hub does not answer, and it is not in the cache",
    "ConnectionError": "the hub does not answer, and it is not in the cache",
    "ConnectTimeout": "the hub does not answer, and it is not in the cache",
    "ReadTimeout": "the hub does not answer in time",
    "LocalEntryNotFoundError": "it is not in the cache, and the hub does not answer or is switched off",
}


def hub_reason(error: BaseException) -> str:
    """What is behind an exception of the hub's client or of a library that uses it; its own first line otherwise."""
    chain, cause = list[BaseException](), error
    while cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__ or cause
    kinds = {kind.__name__ for one in chain for kind in type(one).__mro__}
    return next((reason for kind, reason in _REASONS.items() if kind in kinds), first_line(error))
