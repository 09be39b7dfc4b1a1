-- commit.lua: a batch of changes of one owner.
--
-- KEYS[1] fence of the incarnation   KEYS[2] its owned index   KEYS[3] rooms index of the bucket,
--   then seq of each room in the order of their R, then the keys of the ops
-- ARGV[1] incarnation  ARGV[2] number of the batch
-- ARGV[3] random tag of the batch, also the epoch of rooms that have none
-- ARGV[4] prefix of event channels
-- ARGV[5] number of the newest batch known to have run here; '0': none; 'i': none, and KEYS[4]
--   is the list of live servers, which must contain the incarnation
-- ARGV[6] number of rooms
--
-- Then the ops. Each begins with a name. The name begins with the kind of the op and is
-- unique in the batch (except for R and T); the tag of the batch and the name together
-- are the tag of the write. The arguments and keys of each kind (a test compares this
-- list with the code on both sides):
--
--   R | room tracked | members | begins the ops of a room, once per room; tracked '1': the caller has a rule for it
--   r | room tracked | members users kept recount | the same, if the room may be numbered (see users.lua)
--   W | user grace rebuild | | user of the entry of the next op (J, j, S, M, U), and grace of its rule; rebuild: 0, or the
--     time for which a room that Redis lost is being rebuilt, if the join is a part of that
--   P | mostConnections mostUsers | | bounds for the next op (J, j), 0: none
--   Q | predecessor | conn state | connection whose place the next op (J, j) takes
--   J | conn entry attributes meta | | join without TTL and state
--   j | conn entry attributes meta left state stateLeft | conn state | join; stateLeft '': an earlier copy may exist
--   S | conn entry ttl left stateVersion stateAttributes stateLeft state | conn state | newer state
--   M | conn entry ttl left metaVersion metaAttributes meta | conn state | newer metadata
--   U | conn entry ttl left stateVersion stateAttributes stateLeft state metaVersion metaAttributes meta | conn state | both
--   L | conn entry known | | leave; the last letter of the name is the cause; known '1': Redis has acknowledged the entry
--   l | conn entry known | conn state | leave of an entry that may have keys of its own
--   H | conn entry known | conn state | the same, but its place may be kept; the last letter of the name is the cause
--   C | entries | | number of entries of this incarnation in the room
--   N | | | nothing: the batch itself restores the fence
--   T | conn entry left | members conn | refresh; the name is T and the TTL
--   K | conn metaVersion meta fresh | connection-meta | registration; fresh '1': the first by this incarnation
--   D | conn | connection-meta | end of a registration
--
-- J, j, S, M, U, L, l, H and C are about the room of the last R or r. Attributes are
-- 'stateLength stateVersion flag ' and 'metaVersion metaLength '. Those of a join are
-- the TTL and both.
--
-- Reply: 'FENCED', 'LATE' or 'LOST' for the whole batch, otherwise per op except R, r, W, P, Q
--   a number and a string if it published something or is kept: members of the room (J and j),
--     1 if the place is kept (L, l, H), and 'epoch seq tag' ('' if the position of the room was
--     lost), followed in a numbered room
--       by the number of users ('?': unknown) and 'conn:incarnation' of the replaced entry or '' (J and j),
--       by the time until which the place is kept (L, l, H);
--   or one string: '+' done without an event, '+ version meta' (K: Redis holds newer metadata),
--     '0' no such entry, 'x' another entry ('x incarnation' to S, M, U, T: its owner),
--     'f connections', 'f users' the room is full, nothing changed (J, j),
--     '! text' refused by Redis, nothing changed,
--     'k' nothing changed, the op must be repeated with all keys of its entry and room (j, l, r)

local function connect(key, conn, version, meta, fresh)
  if full then
    return '! ' .. full
  end
  local h = try('HMGET', key, 'v', 'd', 'o')
  if h.err then
    return '! ' .. h.err
  end
  local w, out
  if fresh == '1' and h[1] and h[3] ~= inc then
    -- A connection with this id on another server left these. They are not the metadata
    -- of this connection, regardless of the version.
    local v = (tonumber(h[1]) + 1) .. ''
    w = try('HSET', key, 'o', inc, 'v', v, 'd', meta)
    out = '+ ' .. v .. ' ' .. meta
  elseif h[1] and tonumber(h[1]) > tonumber(version) then
    w = try('HSET', key, 'o', inc)
    out = '+ ' .. h[1] .. ' ' .. (h[2] or '')
  else
    w = try('HSET', key, 'o', inc, 'v', version, 'd', meta)
    out = '+'
  end
  if failed(w) then
    return '! ' .. w.err
  end
  owned['c ' .. conn] = true
  return out
end

local function disconnect(key, conn)
  local o = try('HGET', key, 'o')
  if failed(o) then
    return '! ' .. o.err
  end
  owned['c ' .. conn] = false
  if o == inc then
    call('DEL', key)
  end
  return '+'
end

-- setCount sets the number of entries of this incarnation in the current room, and adds
-- the room to the index of rooms. It restores a lost position and lost numbers. It
-- leaves an empty room as it is, unless that counts only kept places. It also leaves a
-- count that the records do not reach: then some were lost, and only the count shows it.
local function setCount(n)
  if waits == members then
    return 'k'
  end
  local err = stand(batch) or measure()
  if err then
    return '! ' .. err
  end
  if lacksKeys(false) then
    return again()
  end
  if size == 0 then
    if match(homes, '^ ~ %d+$') then
      missed, moved = true, true
    end
    return '0'
  end
  filled[#filled + 1] = room
  if checked then
    moved, position = true, epoch .. ' ' .. seq .. ' ' .. tag -- the numbers may have changed
  end
  count(mine, 0)
  if entries == n and position ~= '' then
    return '+'
  end
  if counted() + n > size then
    return '0'
  end
  entries, moved = n, true
  position = epoch .. ' ' .. seq .. ' ' .. tag
  return '+'
end

-- perform executes the current op. It returns the answer and the number of arguments
-- and keys of the op.
local function perform(name)
  local kind = sub(name, 1, 1)
  local a, b, c, d = args[ai + 1], args[ai + 2], args[ai + 3], args[ai + 4]
  if kind == 'R' then
    enter(a, b, channels, keys[ki])
    return nil, 2, 1
  elseif kind == 'r' then
    enter(a, b, channels, keys[ki], keys[ki + 1], keys[ki + 2], keys[ki + 3])
    return nil, 2, 4
  elseif kind == 'W' then
    newUser, newGrace, newRebuild = a, b, c
    return nil, 3, 0
  elseif kind == 'P' then
    mostConnections, mostUsers = tonumber(a), tonumber(b)
    return nil, 2, 0
  elseif kind == 'Q' then
    predecessor, predecessorConnKey, predecessorStateKey = a, keys[ki], keys[ki + 1]
    return nil, 1, 2
  elseif kind == 'J' then
    return join(batch .. name, a, b, c, d, '0', '', '0'), 4, 0
  elseif kind == 'L' then
    return leave(batch .. name, a, b, c), 3, 0
  elseif kind == 'T' then
    return refresh(name, keys[ki], a, b, c), 3, 2
  elseif kind == 'S' then
    return modify(batch .. name, a, b, c, d, '0', '', '', args[ai + 5], args[ai + 6], args[ai + 7], args[ai + 8]), 8, 2
  elseif kind == 'M' then
    return modify(batch .. name, a, b, c, d, args[ai + 5], args[ai + 6], args[ai + 7], '0', '', '0', ''), 7, 2
  elseif kind == 'U' then
    return modify(batch .. name, a, b, c, d, args[ai + 9], args[ai + 10], args[ai + 11], args[ai + 5], args[ai + 6], args[ai + 7],
      args[ai + 8]), 11, 2
  elseif kind == 'j' then
    return join(batch .. name, a, b, c, d, args[ai + 5], args[ai + 6], args[ai + 7], keys[ki], keys[ki + 1]), 7, 2
  elseif kind == 'l' then
    return leave(batch .. name, a, b, c, keys[ki], keys[ki + 1]), 3, 2
  elseif kind == 'H' then
    return leave(batch .. name, a, b, c, keys[ki], keys[ki + 1], true), 3, 2
  elseif kind == 'C' then
    return setCount(tonumber(a)), 1, 0
  elseif kind == 'N' then
    return '+', 0, 0
  elseif kind == 'K' then
    return connect(keys[ki], a, b, c, d), 4, 1
  end
  return disconnect(keys[ki], a), 1, 1
end

local result, answers = {}, 0

local function performAll()
  local size = #args
  while ai <= size do
    local out, used, touched = perform(args[ai])
    if out then
      answers = answers + 1
      result[answers] = out
      if type(out) == 'number' then
        answers = answers + 1
        result[answers] = (position or '') .. detail
        detail = ''
      end
      newUser, newRebuild, mostConnections, predecessor = nil, nil, nil, nil
    end
    ai, ki = ai + 1 + used, ki + touched
  end
end

local stopped = attempt(performAll, keys[3])
local come, go = {}, {}
for name, there in pairs(owned) do
  if there then
    come[#come + 1] = name
  else
    go[#go + 1] = name
  end
end
spread('SADD', keys[2], come)
spread('SREM', keys[2], go)
return stopped or result
