"""What a model is asked on the way: held-out text, questions with several choices, needles in haystacks."""
