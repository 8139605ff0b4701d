"""The web page of `fewstep app`: a prompt or a class in, pictures out, the teacher's beside them."""
