"""Bad input and broken machines: every case ends in one typed error, at once, with nothing left behind."""
