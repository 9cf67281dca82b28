"""An OpenAI-compatible HTTP server, and JetStream's gRPC beside it, over one driver.

`command` the flags and what they start, `app` the endpoints, `http` bodies in and answers out,
`fields`, `messages`, `requests` what a body asks for, `answers` what it gets, `model` from a folder
to weights and tokenizer.
"""
