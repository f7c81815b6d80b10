"""Store paths, realisations and side files: found, admitted, renewed, read."""
