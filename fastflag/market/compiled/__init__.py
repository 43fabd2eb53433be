"""What Numba compiles. It imports nothing of FastFLAG's but itself and where caches lie, so that a
digest of this folder names what its machine code was made of."""
