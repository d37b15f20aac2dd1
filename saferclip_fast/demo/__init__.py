"""The whole job in one command, on drawn scenes: python -m saferclip_fast.demo"""
