"""The data room: documents in, batches out (see docs/architecture.md, "document -> loss")."""
