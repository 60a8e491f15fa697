"""Others' formats, a file each: what is read is data and never run, what cannot be expressed is refused."""
