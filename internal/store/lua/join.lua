-- join.lua: joins.

-- rebuilds reports whether the join writes an entry again that Redis had before.
local function rebuilds()
  return newRebuild and newRebuild ~= '0'
end

-- reply returns the answer to a join that has written the entry. replaced is
-- 'conn:incarnation' of the entry whose place it took, or ''. For a rebuild the place
-- only ends.
local function reply(replaced)
  if rebuilds() then
    replaced = ''
  end
  if users ~= nil then
    detail = ' ' .. (users or '?') .. ' ' .. replaced
  end
  return sized(0)
end

-- replacedBy returns the item p of extra.
local function replacedBy(extra)
  return match(' ' .. extra, ' p(%S+)') or ''
end

-- placeFor returns the connection whose place a join takes, if any, whether the client named
-- it, and 'conn:incarnation' of its entry. The client may name an entry of the same user
-- in any condition. A kept place of the user is taken in any case.
local function placeFor(conn, user)
  if user == '' then
    return nil
  end
  if predecessor and predecessor ~= conn and not rebuilds() then
    local v = call('HGET', members, predecessor)
    if v and memberOf(v) == user then
      return predecessor, true, predecessor .. ':' .. match(v, '^%S+ (%S+)')
    end
  end
  local place = placeTaken(conn, user)
  if place then
    return place, false, place .. ':~'
  end
  return nil
end

-- fullOf returns what the room is full of for a join, nil if there is room. place is the
-- connection whose place it takes.
local function fullOf(conn, user, place)
  if not mostConnections or rebuilds() or measure() then
    return nil
  end
  local total = size
  if users and size > 0 then
    total = users
  end
  local over = mostConnections > 0 and size >= mostConnections
  local overUsers = mostUsers > 0 and users ~= false and total >= mostUsers
  if not over and not overUsers then
    return nil
  end
  -- An entry that replaces another one takes no more room.
  local v = call('HGET', members, conn)
  if over and not v and not place then
    return 'connections'
  end
  if not overUsers or user ~= '' and users and seatOf(user) then
    return nil -- a further connection of a user
  end
  if v then
    local user0 = memberOf(v)
    local seat = user0 ~= '' and users and seatOf(user0)
    if user0 == user or user0 == '' or seat == '1' or seat == '~' .. conn then
      return nil -- the only one of its user, who leaves
    end
  end
  return 'users'
end

-- noteRebuild notes that a join belongs to the repair of a room that Redis lost. It
-- returns the cause of its event.
local function noteRebuild(user)
  if not rebuilds() or user == '' then
    return '.'
  end
  local till = tonumber(match(epoch, '@(%d+)$') or '0') + tonumber(newRebuild)
  if till > now and (not rebuilding or rebuilding < till) then
    rebuilding = till
  end
  return '='
end

-- arrive publishes a join and ends the entry whose place it takes.
local function arrive(kind, mark, conn, record, user, place, named, replaced)
  local cause, more = noteRebuild(user), nil
  if place and sub(replaced, -2) == ':~' then
    more = 1 -- its seat has been given away already
  end
  if place and cause == '.' then
    publish(kind, '.' .. place .. figures(user, more), conn, record)
  else
    publish(kind, cause .. figures(user, more), conn, record)
  end
  if not place then
    return
  end
  local why = 'p'
  if cause == '=' then
    why = nil -- nobody arrived, so the place ends for its own reason
  end
  local connKey, stateKey
  if named then
    connKey, stateKey = predecessorConnKey, predecessorStateKey
  end
  local entry, by = vacate(place, mark .. '-', why, connKey, stateKey)
  if by == mine then
    owned[indexed(place, entry)] = false
  end
end

local join

-- rejoin is a join of a connection that has an entry.
local function rejoin(mark, conn, entry, attrs, meta, left, state, stateLeft, connKey, stateKey, user, grace)
  local v, out = read(members, conn)
  if not v then
    return out
  end
  local id, by = match(v, '^(%S+)( %S+ )')
  local stop, joined, tail, _
  if id then
    _, stop, _, _, _, _, _, _, _, _, joined, _, tail = find(v, REST, #id + #by + 1)
  end
  if not stop then
    return '! ' .. ODD
  end
  local user0, _, extra, _, _, cause = person(v, stop, tail)
  local ttl, stateAttrs, sv, metaAttrs, mv = match(attrs, '^(%d+) (%d+ (%d+) %S )((%d+) %d+ )')
  if id == entry and by ~= KEPT then
    -- The join has run before, and its reply was lost. A repetition of the same batch
    -- changes nothing. A batch that was made again may contain a newer state, metadata
    -- or TTL, which its owner takes for written.
    out = update(members, v, mark, conn, entry, ttl, left, mv, metaAttrs, meta, sv, stateAttrs, stateLeft, state,
      connKey, stateKey)
    if out ~= 0 and out ~= '+' then
      return out
    end
    owned[indexed(conn, entry)] = true
    return reply(replacedBy(extra))
  end
  if user0 ~= user then
    -- Subscribers see another person.
    if by == mine then
      owned[indexed(conn, id)] = false
    end
    remove(conn, id, by, connKey, stateKey, mark .. '=', cause or 'l', user0)
    return join(mark, conn, entry, attrs, meta, left, state, stateLeft, connKey, stateKey, true)
  end
  local place, named, replaced = placeFor(conn, user)
  local kept = by == KEPT
  if by == mine then
    owned[indexed(conn, id)] = false
  else
    if not kept then
      count(by, -1)
    end
    count(mine, 1)
  end
  owned[indexed(conn, entry)] = true
  extra = ''
  if kept then
    replaced = conn .. ':~'
  end
  if replaced and not rebuilds() then
    extra = 'p' .. replaced
  end
  advance(mark)
  local record = entry .. mine .. attrs .. deadline(stateLeft) .. ' ' .. joined .. ' ' .. seq .. bracketed(user, grace, extra) .. '\n' ..
    user .. extra .. meta .. state
  call('HSET', members, conn, record)
  if ttl ~= '0' then
    call('SET', connKey, entry, 'PX', left)
  else
    call('DEL', connKey)
  end
  setState(stateKey, state, stateLeft)
  if kept then
    if keptKey then
      try('ZREM', keptKey, placeOf(conn, id))
    end
    setUser(conn, user, true, user, false)
    publish('J', '.' .. conn .. figures(user), conn, record)
  else
    arrive('R', mark, conn, record, user, place, named, replaced)
  end
  return reply(replaced or '')
end

-- join writes an entry. admitted: the bounds of the room have been observed.
join = function(mark, conn, entry, attrs, meta, left, state, stateLeft, connKey, stateKey, admitted)
  if full then
    return '! ' .. full
  end
  if waits == members then
    return 'k'
  end
  local err = stand(batch)
  if err then
    return '! ' .. err
  end
  local user, grace, extra = '', '0', ''
  if newUser then
    user, grace = newUser, newGrace
  end
  if lacksKeys(user ~= '', user) then
    return again()
  end
  local place, named, replaced = placeFor(conn, user)
  if replaced and not rebuilds() then
    extra = 'p' .. replaced
  end
  local of = not admitted and fullOf(conn, user, place)
  if of then
    return 'f ' .. of
  end
  local bracket = bracketed(user, grace, extra)
  local next = following()
  local record = entry .. mine .. attrs .. deadline(stateLeft) .. ' ' .. nowText .. ' ' .. next .. bracket .. '\n' ..
    user .. extra .. meta .. state
  -- HSETNX tests and writes in one call.
  local new = try('HSETNX', members, conn, record)
  if new == 0 then
    if not connKey then
      return again()
    end
    return rejoin(mark, conn, entry, attrs, meta, left, state, stateLeft, connKey, stateKey, user, grace)
  end
  if failed(new) then
    return '! ' .. new.err
  end
  advance(mark, next)
  owned[indexed(conn, entry)] = true
  sized(1)
  if bereft(batch) then
    record = entry .. mine .. attrs .. deadline(stateLeft) .. ' ' .. nowText .. ' 1' .. bracket .. '\n' .. user .. extra .. meta .. state
    call('HSET', members, conn, record)
    advance(mark, '1')
  end
  count(mine, 1)
  setUser(conn, nil, nil, user, false)
  if connKey then
    if left ~= '0' then
      call('SET', connKey, entry, 'PX', left)
    end
    if state ~= '' then
      setState(stateKey, state, stateLeft)
    elseif stateLeft == '' then
      call('DEL', stateKey) -- of an entry whose record is lost
    end
  end
  arrive('J', mark, conn, record, user, place, named, replaced)
  return reply(replaced or '')
end
