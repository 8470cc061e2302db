def shown(x, data):
    return data.shown(x)
