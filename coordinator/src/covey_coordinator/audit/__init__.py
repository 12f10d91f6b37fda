"""`covey audit`: attack a model's updates as a coordinator could, on the user's own data, before a round starts.

`settings` is what is asked, `data` what is attacked, `updates` makes real updates with the agent's own trainer,
`suite` says which attacks run on which of them, `budget` how long, `folder` keeps what came out, `policy` judges it.
"""
