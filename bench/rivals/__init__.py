"""What FastFLAG is compared with: other libraries, and itself without one of its ideas."""
