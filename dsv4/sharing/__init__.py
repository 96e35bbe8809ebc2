"""A packed store on a hub: pushed once, pulled by everybody, proved at both ends."""
