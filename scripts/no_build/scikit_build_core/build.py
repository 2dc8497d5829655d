"""Stands in for the build backend that llama-cpp-python's sdist names.

pip asks the backend of a source archive for metadata even when it only downloads. Answering here
means that nothing inside the archive, and no unpinned build tool, runs to get it.
"""

import os


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    """Writes the metadata that scripts/fetch.py passes by environment; returns its folder."""
    name, version = os.environ["SPARKV_SDIST"].split("==")
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    os.makedirs(os.path.join(metadata_directory, info))
    with open(os.path.join(metadata_directory, info, "METADATA"), "w", encoding="ascii") as out:
        out.write(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return info
