"""Opens what a recipe names as a source: the only place that knows which reader belongs to which kind."""

from v4train.data import array_record_tokens, megatron
from v4train.data import config as config_lib
from v4train.data import document as document_lib
from v4train.data import store as store_lib
from v4train.data import tokenizer as tokenizer_lib


def open_store(
    source: config_lib.Source, *, tokenizer: tokenizer_lib.Tokenizer, image_patch: int, cache_bytes: int = store_lib.CACHE_BYTES
) -> store_lib.Store:
    """The documents of a source, which fit the tokenizer and the size of patches.

    Args:
        source: of the recipe.
        tokenizer: of the recipe.
        image_patch: side of the patches that the model reads.
        cache_bytes: memory for decoded documents, where the format needs decoding.

    Raises:
        ValueError: missing, damaged or empty; of another tokenizer; or with other patches. The message names source and remedy.
    """
    try:
        match source:
            case config_lib.MegatronSourceConfig():
                _check_stated(source.tokenizer_fingerprint, tokenizer)
                return megatron.MegatronStore(source.path, tokenizer=tokenizer)
            case config_lib.ArrayRecordSourceConfig():
                _check_stated(source.tokenizer_fingerprint, tokenizer)
                return array_record_tokens.ArrayRecordTokens(
                    source.path, dtype=source.dtype, tokenizer=tokenizer, cache_bytes=cache_bytes, index_directory=source.index_directory
                )
            case _:
                store = store_lib.TokenStore.open(source.path, cache_bytes=cache_bytes)
                _check_store(store, tokenizer=tokenizer, image_patch=image_patch)
                return store
    except ValueError as error:
        raise ValueError(f"data source {source.name!r}: {error}") from None


def _check_stated(stated: str, tokenizer: tokenizer_lib.Tokenizer) -> None:
    if not tokenizer.fingerprint.startswith(stated):
        raise ValueError(
            f"`tokenizer_fingerprint` is {stated}, but the recipe's tokenizer has {tokenizer.fingerprint[:16]}: "
            "change `tokenizer` to the one that made the ids, or, if it is that one, state its fingerprint"
        )


def _check_store(store: store_lib.TokenStore, *, tokenizer: tokenizer_lib.Tokenizer, image_patch: int) -> None:
    if store.tokenizer_fingerprint != tokenizer.fingerprint:
        raise ValueError(f"{store.path} was built with another tokenizer; build it again or change `tokenizer`")
    if store.image_patch != image_patch and bool((store.spans["kind"] == document_lib.IMAGE).any()):
        message = f"{store.path} has image patches of {store.image_patch} pixels, but `image_patch` is {image_patch}"
        raise ValueError(f"{message}: set it to {store.image_patch} or build the store again")
