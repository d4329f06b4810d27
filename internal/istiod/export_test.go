package istiod

// ListAgain is listAgain, for tests.
const ListAgain = listAgain
