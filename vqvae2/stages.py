from vqvae2 import autoencoder_stage, codes
from bitsperdim.model import Stage
def stages(config):
    return (Stage("autoencoder", build=autoencoder_stage.build, optim=config.autoencoder.optim, settings=config.autoencoder.train), Stage("codes", ("autoencoder",), extract=codes.extract, is_extracted=codes.is_extracted))
def report(config, m): return {}
def sampler(*a): pass
