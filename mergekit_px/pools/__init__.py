"""What a spectral merge leaves besides a checkpoint: pools of singular components as files, adapters, reports."""
