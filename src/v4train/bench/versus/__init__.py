"""The same work done by other libraries, in an environment of their own, measured in one run with ours."""
