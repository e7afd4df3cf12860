"""Arrays in, arrays out: the operations that models are made of, each with a dense oracle and one implementation per platform."""
