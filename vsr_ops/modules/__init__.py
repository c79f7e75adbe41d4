"""The networks beside a backbone: upscaler, control, CAPM, STAM, CFW, refiner, compression head."""
