"""One script a data set: each writes data/NAME_{train,valid,test}.json and data/NAME.card.json."""
