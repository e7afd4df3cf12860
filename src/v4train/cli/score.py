"""``v4train score --checkpoint DIR --tokens tokens.npy --out out.npz``: logits, loss, gradient norm and greedy tokens, in fp32."""

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="directory in the released layout, run directory, its checkpoints, or one step"
    )
    parser.add_argument("--tokens", required=True, metavar="FILE", help="token ids, i32 [B, S], as numpy.save writes them")
    parser.add_argument("--out", required=True, metavar="FILE", help="the .npz to write: logits f32 [B, S, V], loss, grad_norm, greedy")
    parser.add_argument("--greedy", type=int, default=0, metavar="N", help="continue the first half of row 0 by N tokens")
    parser.add_argument(
        "--pad-token",
        default="config",
        metavar="ID",
        help="tokens of the prompt with this id are hidden from --greedy as `transformers` hides padding; none: hide nothing "
        "(default: pad_token_id of config.json; if it is null, none, or 0 for a released-layout directory without tokenizer)",
    )


def run(args: argparse.Namespace) -> int:
    """Scores and prints the scalars.

    Raises:
        ValueError: a checkpoint, a tokens file or an output that cannot be used.
    """
    from v4train.interop import score, score_files

    if args.pad_token not in ("config", "none") and not args.pad_token.isdecimal():
        raise ValueError(f"--pad-token {args.pad_token}: expected a token id or none")
    tokens = score_files.read_tokens(args.tokens)
    checkpoint = score.load(args.checkpoint)
    score_files.check(tokens, checkpoint=checkpoint, count=args.greedy, source=args.tokens)
    pad = {"config": checkpoint.pad_token, "none": None}.get(args.pad_token, args.pad_token)
    pad = None if pad is None else int(pad)
    if args.greedy and pad is not None and (tokens[0, : tokens.shape[1] // 2] == pad).any():
        print(f"the prompt of --greedy contains token {pad}: hidden as padding, as `transformers` does (--pad-token none shows it)")
    summary = score_files.write(args.out, checkpoint=checkpoint, tokens=tokens, count=args.greedy, pad_token=pad)
    print(f"loss {summary.loss:.6f} nats per token, gradient norm {summary.grad_norm:.6g}, logits of {tokens.shape} tokens in {args.out}")
    if summary.greedy is not None:
        print(f"greedy: {' '.join(str(token) for token in summary.greedy)}")
    return 0
