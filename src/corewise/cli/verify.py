"""``corewise verify``."""

from corewise.cli.options import ArtifactPath, AsJson, ModelOfArtifact, load_model
from corewise.cli.output import only_json, print_json


def command(artifact_path: ArtifactPath, model: ModelOfArtifact = None, as_json: AsJson = False) -> None:
    """Check an artifact's hashes, whether it fits this CPU, and its outputs for the golden inputs."""
    from corewise.artifact.open import verify
    from corewise.records.jsonable import to_json

    with only_json(as_json):
        verification = verify(artifact_path, model=load_model(model))
    if as_json:
        print_json(to_json(verification))
        return
    print(f"{artifact_path} is sound and fits this CPU")
    print(f"  {verification.files} files, {verification.size_bytes / 1e6:.1f} MB: every sha256 as in the manifest")
    print(f"  golden outputs of {verification.golden_samples} samples: equal to {verification.sqnr_db:.1f} dB")
    for note in verification.notes:
        print(f"  note: {note}")
