"""Products of packed weights with many tokens: warpgroup products, dense and by expert."""
