"""The front door: a cluster as an OpenAI-compatible HTTP server. Importing this package costs nothing; FastAPI is imported by `app`,
uvicorn by `server`. Chapter 11."""
