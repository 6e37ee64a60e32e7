"""Token mixers as nn.Modules, one file each, thin over `lasp.functional`."""
