"""What people write around sentence-transformers: FastAPI, OpenVINO's static int8, and OpenAI's path.

    python bench/peer_texts.py EXPORTS PORT

Run by the peers' own Python; EXPORTS is the folder that ``text_contenders.prepare`` made.
"""

import sys
import threading
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from bench.text_contenders import sentence_transformer

    model = sentence_transformer("openvino int8", Path(sys.argv[1]))
    app, one_by_one = FastAPI(), threading.Lock()

    # Not async: FastAPI runs it in a thread, and the event loop stays free.
    @app.post("/v1/embeddings")
    def embed(body: dict[str, Any]) -> dict[str, Any]:
        """OpenAI's embeddings, in floats."""
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        with one_by_one:  # the model has one inference request
            vectors = model.encode(texts, show_progress_bar=False)
        data = [{"object": "embedding", "index": k, "embedding": row.tolist()} for k, row in enumerate(vectors)]
        return {
            "object": "list",
            "model": body["model"],
            "data": data,
            "usage": {"prompt_tokens": 0, "total_tokens": 0},
        }

    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
